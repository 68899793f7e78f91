use std::ffi::{OsStr, OsString};

use super::CniError;

const COMMAND: &str = "CNI_COMMAND";
const CONTAINER_ID: &str = "CNI_CONTAINERID";
const NETNS: &str = "CNI_NETNS";
const IFNAME: &str = "CNI_IFNAME";
const PATH: &str = "CNI_PATH";

/// IFNAMSIZ of linux/if.h less the terminating zero.
const LONGEST_INTERFACE_NAME: usize = 15;

/// What the container runtime wants done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    /// Attach a container.
    Add,
    /// See that a container is attached as it was.
    Check,
    /// Detach a container.
    Del,
    /// Say whether pods can be attached.
    Status,
    /// Detach what is not attached any more.
    Gc,
    /// Say which versions of the specification are spoken.
    Version,
}

/// The parameters that the container runtime passes in the environment, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Environment {
    pub(super) command: Command,
    pub(super) container_id: String,
    pub(super) interface: String,
    pub(super) path: OsString,
}

impl Command {
    /// The word for it in CNI_COMMAND.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Add => "ADD",
            Self::Check => "CHECK",
            Self::Del => "DEL",
            Self::Status => "STATUS",
            Self::Gc => "GC",
            Self::Version => "VERSION",
        }
    }

    fn parse(word: &str) -> Option<Self> {
        [Self::Add, Self::Check, Self::Del, Self::Status, Self::Gc, Self::Version]
            .into_iter()
            .find(|c| c.as_str() == word)
    }

    // As the CNI library's skeleton has it: DEL works without the namespace.
    fn required(self) -> &'static [&'static str] {
        match self {
            Self::Add | Self::Check => &[CONTAINER_ID, NETNS, IFNAME, PATH],
            Self::Del => &[CONTAINER_ID, IFNAME, PATH],
            Self::Status | Self::Gc => &[PATH],
            Self::Version => &[],
        }
    }
}

impl Environment {
    /// Reads the parameters through `variable`, or `None` when there is no CNI_COMMAND: then
    /// it was a person, not a container runtime, who started the program.
    ///
    /// # Errors
    /// [`CniError::MissingVariables`] or [`CniError::InvalidVariable`].
    pub fn read(
        variable: impl Fn(&'static str) -> Option<OsString>,
    ) -> Result<Option<Self>, CniError> {
        let variable = |name| variable(name).filter(|value| !value.is_empty());
        let Some(word) = variable(COMMAND) else { return Ok(None) };
        let command = word
            .to_str()
            .and_then(Command::parse)
            .ok_or_else(|| invalid(COMMAND, &word, "ADD, CHECK, DEL, STATUS, GC or VERSION"))?;
        let missing: Vec<_> =
            command.required().iter().copied().filter(|name| variable(name).is_none()).collect();
        if !missing.is_empty() {
            return Err(CniError::MissingVariables(missing));
        }
        let (mut container_id, mut interface) = (String::new(), String::new());
        if command.required().contains(&CONTAINER_ID) {
            container_id = text(CONTAINER_ID, variable(CONTAINER_ID), is_identifier, IDENTIFIER)?;
            interface = text(IFNAME, variable(IFNAME), is_interface_name, INTERFACE_NAME)?;
        }
        Ok(Some(Self {
            command,
            container_id,
            interface,
            path: variable(PATH).unwrap_or_default(),
        }))
    }
}

pub(super) const IDENTIFIER: &str =
    "letters, digits, '_', '.' and '-', the first a letter or a digit";
const INTERFACE_NAME: &str =
    "an interface name: 1 to 15 bytes, not '.' or '..', without '/', ':' and white space";

/// Whether the CNI specification takes it for a container ID or a network name. None of them
/// leads out of a folder.
pub(super) fn is_identifier(text: &str) -> bool {
    text.starts_with(|first: char| first.is_ascii_alphanumeric())
        && text.chars().all(|c| c.is_ascii_alphanumeric() || "_.-".contains(c))
}

fn is_interface_name(name: &str) -> bool {
    !name.is_empty()
        && name.len() <= LONGEST_INTERFACE_NAME
        && name != "."
        && name != ".."
        && !name.contains(|c: char| c == '/' || c == ':' || c.is_whitespace())
}

fn text(
    variable: &'static str,
    value: Option<OsString>,
    valid: fn(&str) -> bool,
    expected: &'static str,
) -> Result<String, CniError> {
    let value = value.unwrap_or_default();
    match value.to_str() {
        Some(text) if valid(text) => Ok(text.to_owned()),
        _ => Err(invalid(variable, &value, expected)),
    }
}

fn invalid(variable: &'static str, value: &OsStr, expected: &'static str) -> CniError {
    let value = value.to_string_lossy().chars().take(128).collect();
    CniError::InvalidVariable { variable, value, expected }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn read(pairs: &[(&str, &str)]) -> Result<Option<Environment>, CniError> {
        Environment::read(|name| {
            pairs.iter().find(|(key, _)| *key == name).map(|(_, value)| value.into())
        })
    }

    const ADD: [(&str, &str); 5] = [
        (COMMAND, "ADD"),
        (CONTAINER_ID, "c0ffee"),
        (NETNS, "/proc/1/ns/net"),
        (IFNAME, "eth0"),
        (PATH, "/opt/cni/bin"),
    ];

    #[test]
    fn reads_what_the_runtime_passes() {
        let environment = read(&ADD).unwrap().unwrap();
        assert_eq!(environment.command, Command::Add);
        assert_eq!(environment.container_id, "c0ffee");
        assert_eq!(environment.path, "/opt/cni/bin");
        assert_eq!(read(&ADD[1..]).unwrap(), None);
    }

    #[test]
    fn names_every_missing_variable() {
        let error = read(&ADD[..2]).unwrap_err();
        assert_eq!(error.code(), 4);
        assert!(error.to_string().ends_with("CNI_NETNS, CNI_IFNAME, CNI_PATH"), "{error}");
        let mut del = ADD;
        del[0].1 = "DEL";
        del[2].1 = "";
        assert!(read(&del).is_ok());
    }

    #[test]
    fn refuses_values_that_lead_elsewhere() {
        for (index, value) in [
            (0, "gc"),
            (0, "add"),
            (1, "../../etc/passwd"),
            (1, ".hidden"),
            (1, "a/b"),
            (1, "a\nb"),
            (3, ".."),
            (3, "eth/0"),
            (3, "eth 0"),
            (3, "sixteen-bytes-xx"),
        ] {
            let mut pairs = ADD;
            pairs[index].1 = value;
            let error = read(&pairs).unwrap_err();
            assert_eq!(error.code(), 4, "{error}");
            assert!(error.to_string().contains(pairs[index].0), "{error}");
        }
    }

    proptest! {
        #[test]
        fn an_identifier_stays_in_its_folder(text in "\\PC{0,20}|[./a]{0,8}") {
            if is_identifier(&text) {
                let path = std::path::Path::new("/folder").join(&text);
                prop_assert_eq!(path.parent(), Some(std::path::Path::new("/folder")));
                prop_assert_eq!(path.file_name(), Some(OsStr::new(&text)));
            }
        }
    }
}
