//! `Local -> annotations -> Node`: what agents tell each other, and what they and Flannel do.

use std::collections::BTreeMap;

use gambeson_keys::{Generation, PublicKey, SecretId};

use super::{Local, Node, NodeRecord, Refusal, Transport, annotation, flannel};
use crate::family::Family;

impl Node {
    /// Reads a Node's record, and Flannel's annotations where Flannel drives it and that may be.
    /// Conflicts with other Nodes are the topology's business.
    ///
    /// # Errors
    /// The first thing that is wrong with it.
    pub fn parse(record: &NodeRecord, local: &Local) -> Result<Self, Refusal> {
        match local.flannel.is_some() && flannel::drives(record) {
            true => flannel::parse(record, local),
            false => Self::parse_own(record, local),
        }
    }
}

impl Local {
    /// What this node publishes, keyed without the prefix; `None` means that the annotation
    /// must not be there. All of it belongs in one patch, so that no reader sees half.
    pub fn annotations(&self) -> BTreeMap<String, Option<String>> {
        let current = self.current_key();
        let next_generation = current.and_then(|(generation, _)| generation.next());
        let next = next_generation.and_then(|generation| self.keys.get(&generation));
        let secret = |generation: Option<Generation>| {
            self.secrets.get(&generation?).map(SecretId::to_string)
        };
        let offered = self.transports.contains(&Transport::Vxlan);
        let mac = |family| self.vteps.get(family).filter(|_| offered).map(|mac| mac.to_string());
        let flannels = self.flannel.map(|kind| flannel::published(self, kind));
        let own = [
            (annotation::PUBLIC_KEY, current.map(|(_, key)| key.to_string())),
            (annotation::KEY_GENERATION, current.map(|(generation, _)| generation.to_string())),
            (annotation::NEXT_PUBLIC_KEY, next.map(PublicKey::to_string)),
            (annotation::PSK_ID, secret(current.map(|(generation, _)| generation))),
            (annotation::NEXT_PSK_ID, secret(next_generation.filter(|_| next.is_some()))),
            (annotation::ENDPOINT, self.endpoints.v4.map(|address| address.to_string())),
            (annotation::ENDPOINT_V6, self.endpoints.v6.map(|address| address.to_string())),
            (annotation::PORT, Some(self.port.to_string())),
            (annotation::TRANSPORTS, Some(Transport::list(&self.transports))),
            (annotation::VTEP_MAC, mac(Family::V4)),
            (annotation::VTEP_MAC_V6, mac(Family::V6)),
            (annotation::MTU, Some(self.inner_mtu().to_string())),
        ];
        let all = own.into_iter().chain(flannels.into_iter().flatten());
        all.map(|(name, value)| (name.to_owned(), value)).collect()
    }
}
