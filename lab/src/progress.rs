//! What a person sees while something takes its time: a spinner on a terminal, plain lines
//! elsewhere, nothing in tests.

use std::io::{IsTerminal, stderr};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

/// Tells how far a long operation is, on standard error.
#[derive(Debug)]
pub struct Progress {
    output: Output,
}

#[derive(Debug)]
enum Output {
    Silent,
    Lines,
    Spinner(ProgressBar),
}

impl Progress {
    /// Says nothing.
    pub fn silent() -> Self {
        Self { output: Output::Silent }
    }

    /// A spinner if standard error is a terminal, else a line for each step.
    pub fn on_stderr() -> Self {
        if !stderr().is_terminal() {
            return Self { output: Output::Lines };
        }
        let spinner = ProgressBar::new_spinner();
        if let Ok(style) = ProgressStyle::with_template("{spinner:.green} {msg} {elapsed:.dim}") {
            spinner.set_style(style);
        }
        spinner.enable_steady_tick(Duration::from_millis(100));
        Self { output: Output::Spinner(spinner) }
    }

    /// Something new begins.
    pub fn step(&self, what: impl Into<String>) {
        match &self.output {
            Output::Silent => {}
            Output::Lines => eprintln!("{}", what.into()),
            Output::Spinner(spinner) => spinner.set_message(what.into()),
        }
    }

    /// All is done; the line of the spinner is free again.
    pub fn done(&self) {
        if let Output::Spinner(spinner) = &self.output {
            spinner.finish_and_clear();
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.done();
    }
}
