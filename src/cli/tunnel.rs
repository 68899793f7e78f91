use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use gambeson_tunnel::{
    DEFAULT_MTU, Options, Tunnel, TunnelError, keep_descriptors, keep_memory_private,
};
use nix::unistd::{dup2_stderr, dup2_stdin, dup2_stdout, setsid};
use tracing_subscriber::EnvFilter;

use super::Failure;
use crate::exit::Exit;

/// The file name by which the binary is this subcommand, for `wg-quick`.
const PROGRAM: &str = "gambeson-tunnel";
/// What a background child says once the configuration socket answers.
const READY: &[u8] = b"ready\n";

/// Make a userspace WireGuard device.
///
/// The device is configured with `wg`, `wg-quick` or anything else that speaks WireGuard's
/// cross-platform protocol, through /var/run/wireguard/IFACE.sock. It ends when the device
/// or the socket is deleted, or on SIGTERM.
///
/// Started by the file name `gambeson-tunnel` (a symbolic link to gambeson), it needs no
/// subcommand, as wg-quick calls it:
///
///   ln -s gambeson /usr/local/bin/gambeson-tunnel
///   WG_QUICK_USERSPACE_IMPLEMENTATION=gambeson-tunnel wg-quick up wg0
///
/// Exit codes: 5 without a TUN driver, 6 without permission (CAP_NET_ADMIN), 7 if there is a
/// device of this name already.
#[derive(Debug, clap::Args)]
#[command(verbatim_doc_comment)]
pub(super) struct Args {
    /// Name of the device to make.
    #[arg(value_name = "IFACE")]
    name: String,

    /// Stay in the foreground and log to standard error.
    #[arg(short, long)]
    foreground: bool,

    /// Alias (`ip link` shows it) that the device has from the moment it has its name.
    #[arg(long, value_name = "TEXT")]
    alias: Option<String>,

    /// MTU of the device, bytes.
    #[arg(long, default_value_t = DEFAULT_MTU, value_parser = clap::value_parser!(u32).range(68..=65535))]
    mtu: u32,

    #[command(flatten)]
    datapath: Datapath,

    /// Append the log to this file. In the background nothing is logged otherwise.
    #[arg(long, value_name = "FILE")]
    log_file: Option<PathBuf>,

    /// error, warn, info, debug or trace, or a filter by module.
    #[arg(long, value_name = "LEVEL", env = "GAMBESON_LOG")]
    log_level: Option<String>,

    /// This process is the background child of another.
    #[arg(long, hide = true)]
    background_child: bool,
}

/// How packets are moved. The defaults are the fastest.
#[derive(Debug, clap::Args)]
struct Datapath {
    /// Threads that move packets, each with a queue of the device and sockets of its own
    /// [default: one for each processor, up to 8].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=64))]
    queues: Option<u8>,

    /// Take and give single packets only: the kernel cuts and merges them, not the tunnel.
    #[arg(long)]
    no_tun_offload: bool,

    /// Send datagrams one by one.
    #[arg(long)]
    no_udp_gso: bool,

    /// Receive datagrams as they come, not merged by the kernel.
    #[arg(long)]
    no_udp_gro: bool,

    /// Seal and open all messages with ring, long ones too.
    #[arg(long)]
    no_avx512: bool,
}

impl Datapath {
    fn options(&self) -> gambeson_tunnel::Datapath {
        let fastest = gambeson_tunnel::Datapath::default();
        gambeson_tunnel::Datapath {
            queues: self.queues.map_or(fastest.queues, usize::from),
            tun_offload: !self.no_tun_offload,
            udp_gso: !self.no_udp_gso,
            udp_gro: !self.no_udp_gro,
            avx512: !self.no_avx512,
        }
    }

    /// What says the same to another process.
    fn arguments(&self) -> impl Iterator<Item = String> {
        let flags = [
            (self.no_tun_offload, "--no-tun-offload"),
            (self.no_udp_gso, "--no-udp-gso"),
            (self.no_udp_gro, "--no-udp-gro"),
            (self.no_avx512, "--no-avx512"),
        ];
        let queues = self.queues.map(|queues| format!("--queues={queues}"));
        let given = flags.into_iter().filter(|(is_given, _)| *is_given);
        queues.into_iter().chain(given.map(|(_, flag)| flag.to_owned()))
    }
}

/// The arguments of this process; with the subcommand if it was started by the file name
/// `gambeson-tunnel`.
pub(super) fn arguments() -> Vec<OsString> {
    let mut arguments: Vec<_> = std::env::args_os().collect();
    let program = arguments.first().and_then(|program| Path::new(program).file_name());
    if program == Some(PROGRAM.as_ref()) {
        arguments.insert(1, "tunnel".into());
    }
    arguments
}

pub(super) fn run(args: Args) -> Result<(), Failure> {
    if args.foreground || args.background_child { serve(&args) } else { start_in_background(&args) }
}

fn serve(args: &Args) -> Result<(), Failure> {
    keep_memory_private()?;
    start_log(args)?;
    let mut options = Options::new(&args.name);
    options.mtu = args.mtu;
    options.alias.clone_from(&args.alias);
    options.datapath = args.datapath.options();
    let tunnel = Tunnel::start(&options).map_err(failure)?;
    if args.background_child {
        detach()?;
    }
    tunnel.wait().map_err(failure)
}

fn failure(error: TunnelError) -> Failure {
    let exit = match &error {
        TunnelError::InvalidName { .. } => Exit::Usage,
        TunnelError::NoTun { .. } => Exit::NoTun,
        TunnelError::NoPermission { .. } => Exit::NoPermission,
        TunnelError::NameTaken { .. } | TunnelError::SocketInUse { .. } => Exit::ForeignDevice,
        _ => Exit::Failure,
    };
    Failure::new(exit, error)
}

fn start_log(args: &Args) -> Result<(), Failure> {
    let level = args.log_level.clone().or_else(|| std::env::var("LOG_LEVEL").ok());
    let filter = EnvFilter::try_new(level.as_deref().unwrap_or("info")).map_err(|error| {
        let remedy = "give --log-level a log filter such as info or debug";
        Failure::new(Exit::Usage, format!("{error}; {remedy}"))
    })?;
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_target(false);
    match &args.log_file {
        Some(path) => {
            let file = File::options().create(true).append(true).open(path).map_err(|error| {
                io::Error::new(error.kind(), format!("log file {}: {error}", path.display()))
            })?;
            log.with_ansi(false).with_writer(file).init();
        }
        None if args.foreground => log.with_ansi(false).with_writer(io::stderr).init(),
        None => {}
    }
    Ok(())
}

/// Starts this program again in a session of its own and waits until it says that it is
/// ready, or has failed and said why.
fn start_in_background(args: &Args) -> Result<(), Failure> {
    keep_descriptors()?;
    let mut command = Command::new("/proc/self/exe");
    command.arg0("gambeson").args(["tunnel", "--background-child", &args.name]);
    command.arg(format!("--mtu={}", args.mtu));
    command.args(args.datapath.arguments());
    if let Some(alias) = &args.alias {
        command.arg(format!("--alias={alias}"));
    }
    if let Some(level) = &args.log_level {
        command.arg(format!("--log-level={level}"));
    }
    if let Some(path) = &args.log_file {
        command.arg("--log-file").arg(path);
    }
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?;
    let mut said = Vec::new();
    if let Some(mut stdout) = child.stdout.take() {
        stdout.read_to_end(&mut said)?;
    }
    if said == READY {
        return Ok(());
    }
    let status = child.wait()?;
    // It has printed the reason.
    let code =
        status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(Exit::Failure as u8);
    std::process::exit(code.into())
}

/// Cuts the ties to whoever started this process, after saying that it is ready.
fn detach() -> Result<(), Failure> {
    setsid()?;
    std::env::set_current_dir("/")?;
    let mut stdout = io::stdout();
    stdout.write_all(READY)?;
    stdout.flush()?;
    let null = File::options().read(true).write(true).open("/dev/null")?;
    dup2_stdin(&null)?;
    dup2_stdout(&null)?;
    dup2_stderr(&null)?;
    Ok(())
}
