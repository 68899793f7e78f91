use std::error::Error;
use std::fmt;
use std::process::ExitCode;

use crate::exit::Exit;

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
