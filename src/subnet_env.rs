//! Placeholder: subnet_env.
