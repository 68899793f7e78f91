//! Two devices that hand each other datagrams, without sockets.

mod hostile;
mod pair;
mod sessions;
mod settings;
mod traffic;
