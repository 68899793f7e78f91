//! Integration tests: real namespaces, TUN devices, nft, CNI plugins and `wg`.
