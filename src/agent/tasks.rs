//! The agent's tasks, by name. None of them is meant to end.

use std::fmt::Display;

use tokio::task::JoinSet;

use super::AgentError;

/// Owns the tasks: when it goes, they end.
#[derive(Debug)]
pub(super) struct Tasks {
    set: JoinSet<(&'static str, Option<String>)>,
    names: Vec<(tokio::task::Id, &'static str)>,
}

impl Tasks {
    pub(super) fn new() -> Self {
        Self { set: JoinSet::new(), names: Vec::new() }
    }

    /// Starts a task that runs for ever.
    pub(super) fn spawn(
        &mut self,
        name: &'static str,
        task: impl Future<Output = ()> + Send + 'static,
    ) {
        let handle = self.set.spawn(async move {
            task.await;
            (name, None)
        });
        self.names.push((handle.id(), name));
    }

    /// Starts a task that runs until it fails.
    pub(super) fn spawn_fallible<E: Display>(
        &mut self,
        name: &'static str,
        task: impl Future<Output = Result<(), E>> + Send + 'static,
    ) {
        let handle = self.set.spawn(async move {
            let why = task.await.err().map(|error| error.to_string());
            (name, why)
        });
        self.names.push((handle.id(), name));
    }

    /// Waits until one of them ends, which is an error.
    pub(super) async fn ended(&mut self) -> AgentError {
        match self.set.join_next().await {
            Some(Ok((task, why))) => AgentError::TaskEnded { task, why },
            Some(Err(error)) => {
                let known = self.names.iter().find(|(id, _)| *id == error.id());
                let task = known.map_or("unknown", |(_, name)| name);
                AgentError::TaskEnded { task, why: Some(error.to_string()) }
            }
            None => std::future::pending().await,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_task_that_panics_is_named() {
        let mut tasks = Tasks::new();
        tasks.spawn("steady", std::future::pending());
        tasks.spawn("shaky", async { panic!("on purpose") });
        let error = tasks.ended().await.to_string();
        assert!(error.starts_with("the shaky task ended"), "{error}");
        assert!(error.contains("on purpose"), "{error}");
    }
}
