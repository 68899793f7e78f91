//! Placeholder: agent.
