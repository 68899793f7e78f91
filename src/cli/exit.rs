use std::error::Error;
use std::fmt;
use std::process::ExitCode;

/// Exit codes of `gambeson`. A usage error is 2, as clap reports it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// Anything without a code of its own.
    Failure = 1,
    /// The key store was refused.
    KeyStore = 3,
    /// A UDP port is taken.
    PortTaken = 4,
    /// No TUN device can be made.
    NoTun = 5,
    /// A capability is missing.
    NoPermission = 6,
    /// A device with our name belongs to somebody else.
    ForeignDevice = 7,
    /// `lab verify` found a check that does not hold.
    CheckFailed = 8,
}

/// What a command failed with, for the operator.
#[derive(Debug)]
pub struct Failure {
    exit: Exit,
    source: Box<dyn Error + Send + Sync>,
}

impl Failure {
    /// A failure with this exit code. The message is `source` and its chain of causes.
    pub fn new(exit: Exit, source: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self { exit, source: source.into() }
    }

    /// Prints the chain of causes on standard error and gives the exit code.
    pub fn report(&self) -> ExitCode {
        eprintln!("gambeson: {self}");
        ExitCode::from(self.exit as u8)
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.source)?;
        let mut cause = self.source.source();
        while let Some(error) = cause {
            write!(f, ": {error}")?;
            cause = error.source();
        }
        Ok(())
    }
}

impl<E: Error + Send + Sync + 'static> From<E> for Failure {
    fn from(source: E) -> Self {
        Self::new(Exit::Failure, source)
    }
}
