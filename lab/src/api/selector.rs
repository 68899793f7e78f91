//! Label and field selectors of list and watch.

use serde_json::Value;

use super::error::ApiError;

/// A conjunction of label and field requirements.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Selector {
    labels: Vec<(String, Requirement)>,
    fields: Vec<(String, Requirement)>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Requirement {
    Exists,
    Absent,
    In(Vec<String>),
    NotIn(Vec<String>),
}

impl Selector {
    /// Parses the `labelSelector` and `fieldSelector` parameters.
    pub(super) fn parse(labels: Option<&str>, fields: Option<&str>) -> Result<Self, ApiError> {
        Ok(Self {
            labels: parse_terms(labels.unwrap_or_default())?,
            fields: parse_terms(fields.unwrap_or_default())?,
        })
    }

    /// Whether the object satisfies every requirement.
    pub(super) fn matches(&self, object: &Value) -> bool {
        let label = |key: &str| object["metadata"]["labels"].get(key).and_then(Value::as_str);
        let field = |path: &str| {
            let found = path.split('.').try_fold(object, |value, part| value.get(part));
            Some(found.and_then(Value::as_str).unwrap_or_default())
        };
        self.labels.iter().all(|(key, requirement)| requirement.holds(label(key)))
            && self.fields.iter().all(|(path, requirement)| requirement.holds(field(path)))
    }
}

impl Requirement {
    fn holds(&self, value: Option<&str>) -> bool {
        match self {
            Self::Exists => value.is_some(),
            Self::Absent => value.is_none(),
            Self::In(values) => value.is_some_and(|v| values.iter().any(|x| x == v)),
            Self::NotIn(values) => !value.is_some_and(|v| values.iter().any(|x| x == v)),
        }
    }
}

fn parse_terms(selector: &str) -> Result<Vec<(String, Requirement)>, ApiError> {
    split_terms(selector).into_iter().map(parse_term).collect()
}

/// Splits at commas that are not inside parentheses.
fn split_terms(selector: &str) -> Vec<&str> {
    let mut depth = 0_u32;
    let split = selector.split(|c: char| {
        match c {
            '(' => depth += 1,
            ')' => depth = depth.saturating_sub(1),
            _ => {}
        }
        c == ',' && depth == 0
    });
    split.map(str::trim).filter(|term| !term.is_empty()).collect()
}

fn parse_term(term: &str) -> Result<(String, Requirement), ApiError> {
    let one = |value: &str| vec![value.trim().to_owned()];
    for (operator, negated) in [("!=", true), ("==", false), ("=", false)] {
        if let Some((key, value)) = term.split_once(operator) {
            let values = one(value);
            let requirement =
                if negated { Requirement::NotIn(values) } else { Requirement::In(values) };
            return Ok((key.trim().to_owned(), requirement));
        }
    }
    if let Some((head, list)) = term.split_once('(') {
        let values = list.trim_end_matches(')').split(',').flat_map(one).collect();
        return match head.split_whitespace().collect::<Vec<_>>().as_slice() {
            [key, "in"] => Ok(((*key).to_owned(), Requirement::In(values))),
            [key, "notin"] => Ok(((*key).to_owned(), Requirement::NotIn(values))),
            _ => Err(ApiError::bad_request(format!("cannot parse selector term \"{term}\""))),
        };
    }
    Ok(match term.strip_prefix('!') {
        Some(key) => (key.trim().to_owned(), Requirement::Absent),
        None => (term.to_owned(), Requirement::Exists),
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn selects_by_label_and_field() {
        let node = json!({
            "metadata": {"name": "node-1", "labels": {"zone": "a", "gpu": ""}},
            "spec": {"unschedulable": "no"},
        });
        let matches = |labels, fields| Selector::parse(labels, fields).unwrap().matches(&node);
        assert!(matches(None, None));
        assert!(matches(Some("zone=a,gpu"), Some("metadata.name=node-1")));
        assert!(matches(Some("zone in (a, b),!cpu"), None));
        assert!(matches(Some("zone notin (c,d),zone!=x"), Some("metadata.name!=node-2")));
        assert!(!matches(Some("zone==b"), None));
        assert!(!matches(Some("!gpu"), None));
        assert!(!matches(None, Some("metadata.name=node-2")));
        assert!(Selector::parse(Some("zone within (a)"), None).is_err());
    }
}
