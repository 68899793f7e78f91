//! ValidatingAdmissionPolicies, by a CEL evaluator: who may write what on which Node.

use std::collections::{BTreeMap, HashMap};

use cel::{Context, Program};
use serde::Deserialize;
use serde_json::{Value, json};

/// Who asks.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct User {
    /// `system:serviceaccount:NAMESPACE:NAME`, for example.
    pub username: String,
    /// Groups.
    pub groups: Vec<String>,
    /// What else the token says.
    pub extra: BTreeMap<String, Vec<String>>,
}

/// A request that is to be judged.
#[derive(Debug, Clone, Copy)]
pub struct Review<'a> {
    /// Who asks.
    pub user: &'a User,
    /// `CREATE` or `UPDATE`.
    pub operation: &'a str,
    /// `nodes` or `nodes/status`, for example.
    pub resource: &'a str,
    /// The object as it would be.
    pub object: &'a Value,
    /// The object as it is.
    pub old: Option<&'a Value>,
}

/// Policies that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum PolicyError {
    /// The manifests are not what Kubernetes takes.
    #[error("cannot read the admission policies")]
    Manifest(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// An expression is not CEL.
    #[error("the expression of {place} does not compile: {problem}")]
    Expression {
        /// Policy and expression.
        place: String,
        /// What is wrong.
        problem: String,
    },
}

/// The policies of a cluster.
#[derive(Debug, Default)]
pub struct Policies(Vec<Policy>);

#[derive(Debug)]
struct Policy {
    name: String,
    rules: Vec<Rule>,
    conditions: Vec<Program>,
    variables: Vec<(String, Program)>,
    validations: Vec<Validation>,
}

#[derive(Debug)]
struct Validation {
    expression: Program,
    message: String,
    message_expression: Option<Program>,
}

#[derive(Debug, Deserialize)]
struct Rule {
    operations: Vec<String>,
    resources: Vec<String>,
}

/// Of `ValidatingAdmissionPolicy` what is used here.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Spec {
    match_constraints: Constraints,
    #[serde(default)]
    match_conditions: Vec<Named>,
    #[serde(default)]
    variables: Vec<Named>,
    validations: Vec<ValidationSpec>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Constraints {
    resource_rules: Vec<Rule>,
}

#[derive(Debug, Deserialize)]
struct Named {
    name: String,
    expression: String,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct ValidationSpec {
    expression: String,
    #[serde(default)]
    message: String,
    message_expression: Option<String>,
}

impl Policies {
    /// The policies among these manifests.
    pub fn from_yaml(manifests: &str) -> Result<Self, PolicyError> {
        let objects: Vec<Value> = serde_saphyr::from_multiple(manifests)
            .map_err(|error| PolicyError::Manifest(Box::new(error)))?;
        Self::from_objects(&objects)
    }

    /// The policies among these objects.
    pub fn from_objects(objects: &[Value]) -> Result<Self, PolicyError> {
        let policies = objects.iter().filter(|o| o["kind"] == "ValidatingAdmissionPolicy");
        policies.map(Policy::compile).collect::<Result<_, _>>().map(Self)
    }

    /// Whether every policy that is about the request lets it pass.
    ///
    /// # Errors
    /// Why not, as kube-apiserver words it.
    pub fn judge(&self, review: &Review<'_>) -> Result<(), String> {
        self.0.iter().try_for_each(|policy| {
            policy.judge(review).map_err(|why| {
                let Policy { name, .. } = policy;
                format!(
                    "ValidatingAdmissionPolicy '{name}' with binding '{name}' denied request: {why}"
                )
            })
        })
    }
}

impl Policy {
    fn compile(object: &Value) -> Result<Self, PolicyError> {
        let name = object["metadata"]["name"].as_str().unwrap_or_default().to_owned();
        let spec = Spec::deserialize(&object["spec"])
            .map_err(|error| PolicyError::Manifest(Box::new(error)))?;
        let program = |what: &str, expression: &str| {
            Program::compile(expression).map_err(|error| PolicyError::Expression {
                place: format!("{name}, {what}"),
                problem: error.to_string(),
            })
        };
        let named = |named: Named| Ok((program(&named.name, &named.expression)?, named.name));
        let conditions = spec.match_conditions.into_iter().map(named);
        let conditions = conditions.map(|named| named.map(|(program, _)| program));
        let variables = spec.variables.into_iter().map(named);
        let variables = variables.map(|named| named.map(|(program, name)| (name, program)));
        let validations = spec.validations.into_iter().map(|spec| {
            let message_expression = spec.message_expression.as_deref();
            Ok(Validation {
                expression: program(&spec.expression, &spec.expression)?,
                message_expression: message_expression.map(|e| program(e, e)).transpose()?,
                message: spec.message,
            })
        });
        Ok(Self {
            rules: spec.match_constraints.resource_rules,
            conditions: conditions.collect::<Result<_, _>>()?,
            variables: variables.collect::<Result<_, _>>()?,
            validations: validations.collect::<Result<_, _>>()?,
            name,
        })
    }

    /// An expression that fails is a refusal: `failurePolicy: Fail`.
    fn judge(&self, review: &Review<'_>) -> Result<(), String> {
        let has = |list: &[String], item: &str| list.iter().any(|other| other == item);
        let about = |rule: &Rule| {
            has(&rule.operations, review.operation) && has(&rule.resources, review.resource)
        };
        if !self.rules.iter().any(about) {
            return Ok(());
        }
        let mut context = context(review).map_err(|error| error.to_string())?;
        for condition in &self.conditions {
            if !truth(condition, &context)? {
                return Ok(());
            }
        }
        let mut variables = HashMap::new();
        for (name, program) in &self.variables {
            let value = program.execute(&context).map_err(|error| format!("{name}: {error}"))?;
            variables.insert(name.clone(), value);
            context.add_variable_from_value("variables", variables.clone());
        }
        for validation in &self.validations {
            if !truth(&validation.expression, &context)? {
                return Err(validation.words(&context));
            }
        }
        Ok(())
    }
}

impl Validation {
    fn words(&self, context: &Context<'_, '_>) -> String {
        let words = self.message_expression.as_ref().map(|program| program.execute(context));
        match words {
            Some(Ok(cel::Value::String(words))) => words.to_string(),
            _ => self.message.clone(),
        }
    }
}

fn context(review: &Review<'_>) -> Result<Context<'static, 'static>, cel::SerializationError> {
    let User { username, groups, extra } = review.user;
    let mut user = json!({ "username": username });
    if !groups.is_empty() {
        user["groups"] = json!(groups);
    }
    if !extra.is_empty() {
        user["extra"] = json!(extra);
    }
    let mut context = Context::default();
    context.add_variable("object", review.object)?;
    context.add_variable("oldObject", review.old)?;
    context.add_variable("request", json!({ "userInfo": user, "operation": review.operation }))?;
    Ok(context)
}

fn truth(program: &Program, context: &Context<'_, '_>) -> Result<bool, String> {
    match program.execute(context) {
        Ok(cel::Value::Bool(truth)) => Ok(truth),
        Ok(other) => Err(format!("an expression gave {other:?}")),
        Err(error) => Err(format!("an expression failed: {error}")),
    }
}
