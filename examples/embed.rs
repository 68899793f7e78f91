//! A program with the agent in it: takes the agent's own arguments, says what it sees, and ends
//! with SIGTERM.
//!
//! ```sh
//! cargo run --example embed -- --cluster-cidr 10.244.0.0/16 --kubeconfig ~/.kube/config
//! ```

use std::error::Error;

use gambeson::embed;
use tokio::signal::unix::{SignalKind, signal};

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let mut terminated = signal(SignalKind::terminate())?;
    let mut agent = embed::start(embed::options(std::env::args_os().skip(1))?);
    let status = agent.ready().await?;
    println!("{} is ready, with {} peers", status.node, status.peers.len());
    tokio::select! {
        _ = terminated.recv() => agent.stop().await?,
        ended = agent.ended() => ended?,
    }
    println!("ended; devices, routes and the guard stay");
    Ok(())
}
