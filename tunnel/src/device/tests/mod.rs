//! Two devices that hand each other datagrams, without sockets.

mod hostile;
mod pair;
mod settings;
mod traffic;
