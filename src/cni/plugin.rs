use std::io::Read;

use serde::Serialize;
use serde_json::json;

use super::config::{Attachment, Delegate, NetConf};
use super::delegate::Plugin;
use super::saved::Saved;
use super::{CURRENT_VERSION, CniError, Command, Environment, SUPPORTED_VERSIONS, boot, guard};
use crate::subnet_env::SubnetEnv;

/// No real configuration comes near it.
const LARGEST_CONFIGURATION: u64 = 8 << 20;

/// An error as the container runtime reads it on standard output.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ErrorReport {
    cni_version: String,
    code: u32,
    msg: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    details: String,
}

impl ErrorReport {
    /// The report of an error, in this version of the specification.
    pub fn new(version: &str, error: &CniError) -> Self {
        Self {
            cni_version: version.to_owned(),
            code: error.code(),
            msg: error.to_string(),
            details: error.details(),
        }
    }
}

impl From<CniError> for ErrorReport {
    fn from(error: CniError) -> Self {
        Self::new(CURRENT_VERSION, &error)
    }
}

/// Does what the environment says with the configuration from `stdin`, and gives what goes to
/// standard output. Whatever the bytes are, it returns.
///
/// # Errors
/// The report that goes to standard output instead, with exit status 1.
pub fn run(environment: &Environment, stdin: impl Read) -> Result<Vec<u8>, ErrorReport> {
    match environment.command {
        Command::Version => Ok(versions()),
        Command::Add => configured(environment, stdin, add),
        Command::Check => configured(environment, stdin, check),
        Command::Del => configured(environment, stdin, del),
        Command::Status => configured(environment, stdin, status),
        Command::Gc => configured(environment, stdin, gc),
    }
}

fn versions() -> Vec<u8> {
    let answer = json!({ "cniVersion": CURRENT_VERSION, "supportedVersions": SUPPORTED_VERSIONS });
    answer.to_string().into_bytes()
}

fn configured(
    environment: &Environment,
    stdin: impl Read,
    command: fn(&Environment, &NetConf) -> Result<Vec<u8>, CniError>,
) -> Result<Vec<u8>, ErrorReport> {
    let mut bytes = Vec::new();
    stdin.take(LARGEST_CONFIGURATION).read_to_end(&mut bytes).map_err(CniError::Stdin)?;
    let conf = NetConf::parse(&bytes)?;
    command(environment, &conf).map_err(|error| ErrorReport::new(conf.version(), &error))
}

fn saved(environment: &Environment, conf: &NetConf) -> Saved {
    Saved::of(&conf.data_dir(), &environment.container_id, &environment.interface)
}

fn add(environment: &Environment, conf: &NetConf) -> Result<Vec<u8>, CniError> {
    let saved = &saved(environment, conf);
    let env = SubnetEnv::read(&conf.subnet_file())?;
    let delegate = conf.delegate(&env)?;
    let plugin = Plugin::find(&delegate.plugin, &environment.path)?;
    guard::require()?;
    if let Err(error) = boot::forget_leases(&conf.run_dir(), &delegate) {
        eprintln!("gambeson-cni: forgetting the leases from before the boot: {error}");
    }
    let bytes = delegate.to_bytes();
    let before = saved.load()?;
    saved.store(&bytes)?;
    plugin.add(&bytes).inspect_err(|_| undo_add(&plugin, &bytes, saved, before))
}

// The file of an earlier ADD of the same container is put back: its DEL is still to come.
// Otherwise the delegate cleans up after itself at once, and only if it cannot does the file
// stay for the runtime's DEL to try again.
fn undo_add(plugin: &Plugin, bytes: &[u8], saved: &Saved, before: Option<Vec<u8>>) {
    let undone = match before {
        Some(before) => saved.store(&before),
        None => plugin.del(bytes).and_then(|()| saved.remove()),
    };
    if let Err(error) = undone {
        eprintln!("gambeson-cni: cleaning up after a failed ADD: {error}");
    }
}

fn check(environment: &Environment, conf: &NetConf) -> Result<Vec<u8>, CniError> {
    let saved = saved(environment, conf);
    conf.require_check()?;
    let bytes = saved.load()?.ok_or_else(|| CniError::UnknownContainer {
        id: environment.container_id.clone(),
        path: saved.path(),
    })?;
    let delegate = conf.for_check(Delegate::from_bytes(&bytes)?)?;
    Plugin::find(&delegate.plugin, &environment.path)?.check(&delegate.to_bytes())?;
    Ok(Vec::new())
}

/// Fails only where no pod may start: a node whose STATUS fails is NotReady.
fn status(environment: &Environment, conf: &NetConf) -> Result<Vec<u8>, CniError> {
    conf.require_status("STATUS")?;
    let available = || {
        let env = SubnetEnv::read(&conf.subnet_file())?;
        Plugin::find(&conf.delegate(&env)?.plugin, &environment.path)?;
        guard::require()
    };
    available().map(|()| Vec::new()).map_err(|error| CniError::Unavailable(Box::new(error)))
}

/// Deletes every attachment to this network that the runtime does not know any more.
fn gc(environment: &Environment, conf: &NetConf) -> Result<Vec<u8>, CniError> {
    conf.require_status("GC")?;
    let valid = conf.valid_attachments()?;
    let mut failed = None;
    for (container_id, interface) in Saved::all(&conf.data_dir())? {
        let attachment = Attachment { container_id, interface };
        if valid.contains(&attachment) {
            continue;
        }
        // One that cannot be deleted must not keep the others.
        failed = collect(environment, conf, &attachment).err().or(failed);
    }
    failed.map_or(Ok(Vec::new()), Err)
}

fn collect(
    environment: &Environment,
    conf: &NetConf,
    Attachment { container_id, interface }: &Attachment,
) -> Result<(), CniError> {
    let saved = Saved::of(&conf.data_dir(), container_id, interface);
    let Some(bytes) = saved.load()? else { return Ok(()) };
    let delegate = Delegate::from_bytes(&bytes)?;
    if delegate.network() != conf.name() {
        return Ok(());
    }
    let plugin = Plugin::find(&delegate.plugin, &environment.path)?;
    plugin.for_container(container_id, interface).del(&bytes)?;
    saved.remove()
}

fn del(environment: &Environment, conf: &NetConf) -> Result<Vec<u8>, CniError> {
    let saved = saved(environment, conf);
    let Some(bytes) = saved.load()? else { return Ok(Vec::new()) };
    match Delegate::from_bytes(&bytes) {
        Ok(delegate) => Plugin::find(&delegate.plugin, &environment.path)?.del(&bytes)?,
        // As with Flannel's: the interface goes with the pod's namespace, and an error here
        // would keep the pod from ever being deleted.
        Err(error) => {
            let path = saved.path();
            eprintln!("gambeson-cni: {} is unusable and is removed: {error}", path.display());
        }
    }
    saved.remove()?;
    Ok(Vec::new())
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use proptest::prelude::*;
    use serde_json::{Map, Value};

    use super::*;

    const COMMANDS: [Command; 5] =
        [Command::Add, Command::Check, Command::Del, Command::Status, Command::Gc];

    fn environment(command: Command) -> Environment {
        let path = "/nonexistent".into();
        Environment { command, container_id: "c".into(), interface: "eth0".into(), path }
    }

    fn conf(directory: &Path) -> Value {
        json!({
            "name": "n",
            "subnetFile": directory.join("subnet.env"),
            "dataDir": directory.join("data"),
        })
    }

    #[test]
    fn version_does_not_read_standard_input() {
        let answer = run(&environment(Command::Version), &b"\xff"[..]).unwrap();
        assert_eq!(
            String::from_utf8(answer).unwrap(),
            r#"{"cniVersion":"1.1.0","supportedVersions":["0.1.0","0.2.0","0.3.0","0.3.1","0.4.0","1.0.0","1.1.0"]}"#
        );
    }

    #[test]
    fn without_subnet_env_add_says_try_again_later_and_where_to_look() {
        let directory = tempfile::tempdir().unwrap();
        let stdin = conf(directory.path()).to_string();
        let report = run(&environment(Command::Add), stdin.as_bytes()).unwrap_err();
        assert_eq!(report.code, 11);
        assert!(report.msg.contains("subnet.env"), "{}", report.msg);
        assert!(report.msg.contains("Gambeson agent"), "{}", report.msg);
    }

    #[test]
    fn a_missing_delegate_is_named_and_nothing_is_saved() {
        let directory = tempfile::tempdir().unwrap();
        let env = "FLANNEL_NETWORK=10.0.0.0/8\nFLANNEL_SUBNET=10.1.0.1/24\nFLANNEL_MTU=1440\n\
                   FLANNEL_IPMASQ=true\n";
        std::fs::write(directory.path().join("subnet.env"), env).unwrap();
        let stdin = conf(directory.path()).to_string();
        let report = run(&environment(Command::Add), stdin.as_bytes()).unwrap_err();
        assert_eq!(report.code, 100);
        assert!(report.msg.contains("\"bridge\"") && report.msg.contains("/nonexistent"));
        assert!(!directory.path().join("data").exists());
    }

    #[test]
    fn del_without_or_with_an_unusable_saved_file_succeeds() {
        let directory = tempfile::tempdir().unwrap();
        let stdin = conf(directory.path()).to_string();
        assert_eq!(run(&environment(Command::Del), stdin.as_bytes()).unwrap(), b"");
        let saved = directory.path().join("data/c");
        std::fs::create_dir(directory.path().join("data")).unwrap();
        std::fs::write(&saved, "{\"type\":").unwrap();
        assert_eq!(run(&environment(Command::Del), stdin.as_bytes()).unwrap(), b"");
        assert!(!saved.exists());
    }

    fn any_json() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            any::<f64>().prop_map(Value::from),
            "\\PC{0,12}".prop_map(Value::from),
            Just(Value::from("10.0.0.0/8")),
        ];
        leaf.prop_recursive(3, 16, 4, |inner| {
            let key = "type|name|routes|dst|ranges|[a-z]{0,4}";
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                prop::collection::btree_map(key, inner, 0..4)
                    .prop_map(|map| Value::Object(Map::from_iter(map))),
            ]
        })
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in prop::collection::vec(any::<u8>(), 0..256)) {
            for command in COMMANDS {
                let _ = run(&environment(command), &bytes[..]);
            }
        }

        #[test]
        fn no_configuration_panics(
            fields in prop::collection::btree_map(
                "cniVersion|delegate|runtimeConfig|ipam|prevResult|cni.dev/valid-attachments",
                any_json(), 0..5),
        ) {
            let directory = tempfile::tempdir().unwrap();
            let mut stdin = conf(directory.path());
            stdin.as_object_mut().unwrap().extend(fields);
            for command in COMMANDS {
                let _ = run(&environment(command), stdin.to_string().as_bytes());
            }
        }
    }
}
