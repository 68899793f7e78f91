//! Table `inet gambeson`: the fail-closed guard and masquerade, through the program `nft`.
//!
//! The table is written in one transaction that keeps the guard's counters. Whether it is
//! intact is decided by comparing what `nft` lists now with what it listed after our write:
//! so a rule that somebody changed is noticed, in whatever way it was changed. That listing
//! is believed only when the kernel's count of transactions shows that nobody else's fell
//! between the look at what was there and the listing:
//!
//! ```text
//! count n -> list, write, count n + 1 -> list, count n + 1     what was meant is what is there
//! ```

mod forward;
mod render;

use std::process::Stdio;
use std::time::Duration;

use gambeson_mesh::desired::Ruleset;
use serde_json::Value;
use tokio::io::AsyncWriteExt as _;
use tokio::process::Command;
use tokio::time::timeout;

use super::{ApplyError, generation};
pub(super) use forward::{
    accept as accept_forwarded, observe as observe_forwarded, remove as remove_forwarded,
    remove_flannel,
};
pub(crate) use render::OUT as GUARD_CHAIN;
use render::{IN, OUT, fits, render, render_anew};

/// It takes some ten milliseconds; then it hangs.
const ANSWER: Duration = Duration::from_secs(3);
/// How often a write is repeated when somebody else changes the ruleset at the same time.
const ATTEMPTS: usize = 10;

/// What the guard has dropped since its table was first made.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct GuardDrops {
    /// Packets to the cluster networks that were about to leave in clear.
    pub out_packets: u64,
    /// Their bytes.
    pub out_bytes: u64,
    /// Packets from the cluster networks that arrived in clear.
    pub in_packets: u64,
    /// Their bytes.
    pub in_bytes: u64,
}

/// A ruleset that was written, and how `nft` lists it.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Written {
    pub(super) ruleset: Ruleset,
    listing: Value,
    /// The namespace's ruleset generation at which the table was seen to be intact.
    generation: Option<u32>,
}

/// Writes the ruleset and remembers how it is listed.
///
/// # Errors
/// [`ApplyError::Disturbed`] when it was written, but others kept changing the ruleset, so
/// that what is there cannot be told.
pub(super) async fn write(ruleset: &Ruleset) -> Result<Written, ApplyError> {
    for _ in 0..ATTEMPTS {
        if let Some(written) = write_alone(ruleset).await? {
            return Ok(written);
        }
    }
    Err(ApplyError::Disturbed { attempts: ATTEMPTS })
}

/// Writes the ruleset, or gives `None` when others changed something meanwhile.
async fn write_alone(ruleset: &Ruleset) -> Result<Option<Written>, ApplyError> {
    let before = generation().await?;
    let present = list().await?;
    let text = match &present {
        Some(listing) if !fits(ruleset, listing) => {
            render_anew(ruleset, drops_in(listing).unwrap_or_default())?
        }
        _ => render(ruleset)?,
    };
    run(&["-f", "-"], Some(&text), "load table inet gambeson").await?;
    // The kernel leaves zero out.
    let ours = before.checked_add(1).unwrap_or(1);
    if generation().await? != ours {
        return Ok(None);
    }
    let listing = list().await?;
    match listing {
        Some(listing) if generation().await? == ours => Ok(Some(Written {
            ruleset: ruleset.clone(),
            listing: normalised(listing),
            generation: Some(ours),
        })),
        _ => Ok(None),
    }
}

/// Removes the table. Gives its name if there was one.
pub(super) async fn remove() -> Result<Option<String>, ApplyError> {
    if list().await?.is_none() {
        return Ok(None);
    }
    let table = "table inet gambeson";
    run(&["delete", "table", "inet", "gambeson"], None, "delete table inet gambeson").await?;
    Ok(Some(table.to_owned()))
}

/// Whether the table still is exactly what was written.
pub(super) async fn is_intact(written: &mut Written) -> Result<bool, ApplyError> {
    // Read before the table: a change in between is seen the next time.
    let generation = generation().await?;
    if Some(generation) == written.generation {
        return Ok(true);
    }
    let intact = list().await?.is_some_and(|listing| normalised(listing) == written.listing);
    written.generation = intact.then_some(generation);
    Ok(intact)
}

/// The count of transactions in this namespace.
pub(super) async fn generation() -> Result<u32, ApplyError> {
    generation::read().await.map_err(|source| ApplyError::ReadGeneration { source })
}

/// Reads the guard's counters.
pub(super) async fn drops() -> Result<GuardDrops, ApplyError> {
    let Some(listing) = list_counters().await? else {
        return Err(ApplyError::NoCounter { name: OUT });
    };
    drops_in(&listing)
}

fn objects(listing: &Value) -> impl Iterator<Item = (&str, &Value)> {
    let list = listing["nftables"].as_array().map(Vec::as_slice).unwrap_or_default();
    list.iter().filter_map(Value::as_object).flatten().map(|(kind, object)| (kind.as_str(), object))
}

fn drops_in(listing: &Value) -> Result<GuardDrops, ApplyError> {
    let value = |name: &'static str| {
        objects(listing)
            .find(|(kind, object)| *kind == "counter" && object["name"] == *name)
            .and_then(|(_, c)| Some((c["packets"].as_u64()?, c["bytes"].as_u64()?)))
            .ok_or(ApplyError::NoCounter { name })
    };
    let (out_packets, out_bytes) = value(OUT)?;
    let (in_packets, in_bytes) = value(IN)?;
    Ok(GuardDrops { out_packets, out_bytes, in_packets, in_bytes })
}

/// A listing without what changes by itself: handles, counter values and the version line.
fn normalised(mut listing: Value) -> Value {
    fn strip(value: &mut Value) {
        match value {
            Value::Object(map) => {
                for volatile in ["handle", "packets", "bytes", "metainfo"] {
                    map.remove(volatile);
                }
                map.values_mut().for_each(strip);
            }
            Value::Array(list) => list.iter_mut().for_each(strip),
            _ => {}
        }
    }
    strip(&mut listing);
    listing
}

/// The table as `nft -j` lists it, or `None` when it does not exist.
async fn list() -> Result<Option<Value>, ApplyError> {
    query(&["-j", "list", "table", "inet", "gambeson"]).await
}

async fn list_counters() -> Result<Option<Value>, ApplyError> {
    query(&["-j", "list", "counters", "table", "inet", "gambeson"]).await
}

async fn query(arguments: &[&str]) -> Result<Option<Value>, ApplyError> {
    match run(arguments, None, "list table inet gambeson").await {
        Ok(text) => serde_json::from_slice(&text)
            .map(Some)
            .map_err(|source| ApplyError::ParseNft { source }),
        Err(ApplyError::Nft { message, .. }) if message.contains("No such file or directory") => {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

async fn run(
    arguments: &[&str],
    input: Option<&str>,
    operation: &'static str,
) -> Result<Vec<u8>, ApplyError> {
    let failed = |source| ApplyError::StartNft { source };
    let mut child = Command::new("nft")
        .args(arguments)
        // Its messages are compared above.
        .env("LC_ALL", "C")
        .stdin(if input.is_some() { Stdio::piped() } else { Stdio::null() })
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(failed)?;
    if let (Some(text), Some(mut stdin)) = (input, child.stdin.take()) {
        // When nft ends before it has read everything, its own message says why.
        if let Err(error) = stdin.write_all(text.as_bytes()).await {
            tracing::debug!(%error, "nft did not read its input");
        }
    }
    // Dropped, it is killed.
    let Ok(output) = timeout(ANSWER, child.wait_with_output()).await else {
        return Err(ApplyError::NftHangs { operation, seconds: ANSWER.as_secs() });
    };
    let output = output.map_err(failed)?;
    if output.status.success() {
        return Ok(output.stdout);
    }
    // The rest of it repeats the rule and underlines it.
    let message = String::from_utf8_lossy(&output.stderr);
    let message = message.lines().next().unwrap_or("no message").to_owned();
    Err(ApplyError::Nft { operation, message })
}
