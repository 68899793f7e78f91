//! Stands in for flanneld on a node of a lab: the annotations, devices, routes, subnet.env and
//! firewall of Flannel v0.28 with the backends vxlan, host-gw and wireguard (`Mode` auto), and
//! nothing of its code. As flanneld it leaves everything as it is when it ends.

use std::collections::BTreeMap;
use std::error::Error;
use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::Duration;

use clap::Parser;
use gambeson_lab::{Api, Patch};
use ipnet::IpNet;
use serde_json::{Value, json};

type Failure = Box<dyn Error>;

/// How often the Nodes are read; flanneld watches them.
const PAUSE: Duration = Duration::from_millis(100);
const WIREGUARD: &str = "flannel-wg";
const WIREGUARD_PORT: u16 = 51820;
const PREFIX: &str = "flannel.alpha.coreos.com";

#[derive(Debug, Parser)]
struct Args {
    #[arg(long)]
    api: String,
    #[arg(long)]
    node: String,
    #[arg(long)]
    iface: String,
    #[arg(long)]
    net_config_path: PathBuf,
    #[arg(long)]
    subnet_file: PathBuf,
    #[arg(long)]
    cni_conf_dir: PathBuf,
    /// Serves flannel-wg, since a kernel in CI may have no WireGuard.
    #[arg(long)]
    tunnel_program: PathBuf,
}

/// One family of the cluster and of this node.
struct Family {
    network: IpNet,
    subnet: IpNet,
    address: IpAddr,
}

/// What another node's lease says.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Lease {
    address: IpAddr,
    mac: Option<String>,
    key: Option<String>,
    port: u64,
}

struct Flannel {
    args: Args,
    api: Api,
    kind: String,
    vni: u64,
    underlay_mtu: u64,
    /// Of pods.
    mtu: u64,
    families: Vec<Family>,
    leases: BTreeMap<IpNet, Lease>,
}

fn main() -> Result<(), Failure> {
    let args = Args::parse();
    let mut flannel = Flannel::start(args)?;
    loop {
        // The API server may be away.
        if let Ok(nodes) = flannel.api.nodes() {
            flannel.follow(&nodes)?;
        }
        sleep(PAUSE);
    }
}

impl Flannel {
    /// Makes the devices, then the lease, then what the CNI plugin needs.
    fn start(args: Args) -> Result<Self, Failure> {
        let api = Api::at(&args.api)?;
        let conf: Value = serde_json::from_str(&fs::read_to_string(&args.net_config_path)?)?;
        let node = api.node(&args.node)?;
        let link = &json("ip", &["-j", "addr", "show", "dev", &args.iface])?[0];
        let mut families = Vec::new();
        for (network, kind) in [("Network", "inet"), ("IPv6Network", "inet6")] {
            let Some(network) = conf[network].as_str() else { continue };
            let network: IpNet = network.parse()?;
            let subnets = node["spec"]["podCIDRs"].as_array().into_iter().flatten();
            let mut subnets = subnets.filter_map(|cidr| cidr.as_str()?.parse::<IpNet>().ok());
            let same = |net: &IpNet| net.addr().is_ipv4() == network.addr().is_ipv4();
            let addresses = link["addr_info"].as_array().into_iter().flatten();
            let mut global = addresses.filter(|a| a["family"] == kind && a["scope"] == "global");
            let address = global.find_map(|a| a["local"].as_str()?.parse().ok());
            if let (Some(subnet), Some(address)) = (subnets.find(same), address) {
                families.push(Family { network, subnet, address });
            }
        }
        let backend = &conf["Backend"];
        let mut flannel = Self {
            kind: backend["Type"].as_str().unwrap_or("vxlan").to_owned(),
            vni: backend["VNI"].as_u64().unwrap_or(1),
            underlay_mtu: link["mtu"].as_u64().ok_or("no MTU")?,
            mtu: link["mtu"].as_u64().ok_or("no MTU")?,
            args,
            api,
            families,
            leases: BTreeMap::new(),
        };
        flannel.mtu -= match flannel.kind.as_str() {
            "vxlan" => flannel.families.iter().map(|f| overhead(f.address)).max().unwrap_or(0),
            "wireguard" => 80,
            _ => 0,
        };
        for path in ["ipv4/ip_forward", "ipv6/conf/all/forwarding"] {
            fs::write(Path::new("/proc/sys/net").join(path), "1")?;
        }
        flannel.acquire(&node)?;
        flannel.masquerade()?;
        flannel.hand_over()?;
        Ok(flannel)
    }

    fn acquire(&self, node: &Value) -> Result<(), Failure> {
        let key = (self.kind == "wireguard").then(|| self.wireguard()).transpose()?;
        let mut annotations = json!({ format!("{PREFIX}/kube-subnet-manager"): "true" });
        annotations[format!("{PREFIX}/backend-type")] = self.kind.clone().into();
        for family in &self.families {
            let v6 = family.address.is_ipv6();
            let (data, ip) = names(v6);
            let before: Value = node["metadata"]["annotations"][&data]
                .as_str()
                .map_or(Ok(Value::Null), serde_json::from_str)?;
            let value = match self.kind.as_str() {
                "vxlan" => {
                    let mac = self.vxlan(family, before["VtepMAC"].as_str())?;
                    format!("{{\"VNI\":{},\"VtepMAC\":\"{mac}\"}}", self.vni)
                }
                _ => match &key {
                    Some(key) => format!("{{\"PublicKey\":\"{key}\",\"Port\":{WIREGUARD_PORT}}}"),
                    None => "null".to_owned(),
                },
            };
            annotations[data] = value.into();
            annotations[ip] = family.address.to_string().into();
        }
        let patch = json!({ "metadata": { "annotations": annotations } });
        self.api.patch_status(&self.args.node, Patch::Strategic, &patch)?;
        Ok(())
    }

    fn device(&self, v6: bool) -> String {
        format!("flannel{}.{}", if v6 { "-v6" } else { "" }, self.vni)
    }

    /// The device of a family, with the address that the lease had before. One that fits stays.
    fn vxlan(&self, family: &Family, mac: Option<&str>) -> Result<String, Failure> {
        let name = self.device(family.address.is_ipv6());
        let (id, local) = (self.vni.to_string(), family.address.to_string());
        let show = || json("ip", &["-j", "-d", "link", "show", "dev", &name]);
        let fits = |link: &Value| {
            let data = &link[0]["linkinfo"]["info_data"];
            data["id"] == self.vni
                && data["port"] == 8472
                && (data["local"] == *local || data["local6"] == *local)
        };
        if !show().is_ok_and(|link| fits(&link)) {
            let _ = run("ip", &["link", "del", &name]);
            let mut add = vec!["link", "add", &name];
            if let Some(mac) = mac {
                add.extend(["address", mac]);
            }
            add.extend(["type", "vxlan", "id", &id, "dev", &self.args.iface, "local", &local]);
            add.extend(["dstport", "8472", "nolearning"]);
            run("ip", &add)?;
        }
        let base = IpNet::from(family.subnet.network()).to_string();
        run(
            "ip",
            &["addr", "replace", &base, "dev", &name, "nodad"].as_slice()
                [..if family.address.is_ipv6() { 6 } else { 5 }],
        )?;
        let mtu = self.underlay_mtu - overhead(family.address);
        run("ip", &["link", "set", &name, "mtu", &mtu.to_string(), "up"])?;
        Ok(show()?[0]["address"].as_str().ok_or("no MAC")?.to_owned())
    }

    /// The device with a key that is made once, and anew each time, as flanneld does.
    fn wireguard(&self) -> Result<String, Failure> {
        let file = self.args.subnet_file.with_file_name("wgkey");
        if !file.exists() {
            fs::create_dir_all(file.parent().ok_or("no folder")?)?;
            fs::write(&file, output("wg", &["genkey"])?)?;
        }
        let _ = run("ip", &["link", "del", WIREGUARD]);
        let program = self.args.tunnel_program.to_str().ok_or("not UTF-8")?;
        run(program, &["tunnel", WIREGUARD])?;
        let (port, file) = (WIREGUARD_PORT.to_string(), file.display().to_string());
        run("wg", &["set", WIREGUARD, "listen-port", &port, "private-key", &file])?;
        for family in &self.families {
            let base = IpNet::from(family.subnet.network()).to_string();
            run("ip", &["addr", "replace", &base, "dev", WIREGUARD])?;
        }
        run("ip", &["link", "set", WIREGUARD, "mtu", &self.mtu.to_string(), "up"])?;
        let key = output("wg", &["show", WIREGUARD, "public-key"])?;
        Ok(String::from_utf8(key)?.trim().to_owned())
    }

    /// As with `EnableNFTables`.
    fn masquerade(&self) -> Result<(), Failure> {
        for family in &self.families {
            let (ip, table, multicast) = match family.network {
                IpNet::V4(_) => ("ip", "flannel-ipv4", "224.0.0.0/4"),
                IpNet::V6(_) => ("ip6", "flannel-ipv6", "ff00::/8"),
            };
            let pods = family.network;
            let text = format!(
                "table {ip} {table} {{ chain postrtg {{
                    type nat hook postrouting priority srcnat; policy accept;
                    meta mark 0x4000 return
                    {ip} saddr {pods} {ip} daddr {pods} return
                    {ip} saddr {pods} {ip} daddr != {multicast} masquerade fully-random
                }};}}"
            );
            let _ = run("nft", &["delete", "table", ip, table]);
            run("nft", &[&text])?;
        }
        Ok(())
    }

    /// subnet.env, and a list with what Flannel's plugin would delegate to.
    fn hand_over(&self) -> Result<(), Failure> {
        let mut env = String::new();
        let (mut ranges, mut routes) = (Vec::new(), Vec::new());
        for Family { network, subnet, .. } in &self.families {
            let prefix = if network.addr().is_ipv6() { "FLANNEL_IPV6" } else { "FLANNEL" };
            let gateway = subnet.hosts().find(|ip| *ip != subnet.network()).ok_or("no gateway")?;
            env += &format!(
                "{prefix}_NETWORK={network}\n{prefix}_SUBNET={gateway}/{}\n",
                subnet.prefix_len()
            );
            ranges.push(json!([{ "subnet": subnet }]));
            routes.push(json!({ "dst": network }));
        }
        env += &format!("FLANNEL_MTU={}\nFLANNEL_IPMASQ=true\n", self.mtu);
        let list = json!({
            "name": "cbr0", "cniVersion": "0.3.1",
            "plugins": [{
                "type": "bridge", "bridge": "cni0", "hairpinMode": true, "ipMasq": false,
                "isDefaultGateway": true, "isGateway": true, "mtu": self.mtu,
                "ipam": { "type": "host-local", "ranges": ranges, "routes": routes },
            }],
        });
        let conf = self.args.cni_conf_dir.join("10-flannel.conflist");
        for (path, contents) in [(&self.args.subnet_file, env), (&conf, list.to_string())] {
            fs::create_dir_all(path.parent().ok_or("no folder")?)?;
            let temporary = path.with_extension("new");
            fs::write(&temporary, contents)?;
            fs::rename(&temporary, path)?;
        }
        Ok(())
    }

    /// Brings the routes to what the leases of the other nodes say.
    fn follow(&mut self, nodes: &[Value]) -> Result<(), Failure> {
        let mut leases = BTreeMap::new();
        for node in nodes.iter().filter(|node| node["metadata"]["name"] != *self.args.node) {
            let annotations = &node["metadata"]["annotations"];
            let is = |name: &str, value: &str| annotations[format!("{PREFIX}/{name}")] == *value;
            if !is("kube-subnet-manager", "true") || !is("backend-type", &self.kind) {
                continue;
            }
            for cidr in node["spec"]["podCIDRs"].as_array().into_iter().flatten() {
                let subnet: IpNet = cidr.as_str().ok_or("no CIDR")?.parse()?;
                let (data, ip) = names(subnet.addr().is_ipv6());
                let Some(address) = annotations[ip].as_str() else { continue };
                let data: Value =
                    serde_json::from_str(annotations[data].as_str().unwrap_or("null"))?;
                let text = |name: &str| data[name].as_str().map(str::to_owned);
                let lease = Lease {
                    address: address.parse()?,
                    mac: text("VtepMAC"),
                    key: text("PublicKey"),
                    port: data["Port"].as_u64().unwrap_or(WIREGUARD_PORT.into()),
                };
                leases.insert(subnet, lease);
            }
        }
        if self.kind == "wireguard" && self.leases != leases {
            self.set_peers(&leases)?;
        }
        for (subnet, lease) in std::mem::take(&mut self.leases) {
            if leases.get(&subnet) != Some(&lease) {
                self.remove(&subnet, &lease);
            } else {
                self.leases.insert(subnet, lease);
            }
        }
        for (subnet, lease) in leases {
            if !self.leases.contains_key(&subnet) {
                self.add(&subnet, &lease)?;
                self.leases.insert(subnet, lease);
            }
        }
        Ok(())
    }

    /// One tunnel for both families: each key with all of its subnets, over IPv4 if it can be.
    fn set_peers(&self, leases: &BTreeMap<IpNet, Lease>) -> Result<(), Failure> {
        let mut peers: BTreeMap<&str, (Vec<String>, &Lease)> = BTreeMap::new();
        for (subnet, lease) in leases {
            let Some(key) = &lease.key else { continue };
            peers.entry(key).or_insert((Vec::new(), lease)).0.push(subnet.to_string());
        }
        for key in self.leases.values().filter_map(|lease| lease.key.as_deref()) {
            if !peers.contains_key(key) {
                run("wg", &["set", WIREGUARD, "peer", key, "remove"])?;
            }
        }
        for (key, (subnets, lease)) in peers {
            let endpoint = SocketAddr::new(lease.address, u16::try_from(lease.port)?).to_string();
            let allowed = subnets.join(",");
            let peer = ["set", WIREGUARD, "peer", key, "endpoint", &endpoint];
            run("wg", &[&peer[..], &["allowed-ips", &allowed]].concat())?;
        }
        Ok(())
    }

    fn add(&self, subnet: &IpNet, lease: &Lease) -> Result<(), Failure> {
        let (cidr, base) = (subnet.to_string(), subnet.network().to_string());
        let node = lease.address.to_string();
        if lease.key.is_some() {
            return run("ip", &["route", "replace", &cidr, "dev", WIREGUARD]);
        }
        let Some(mac) = &lease.mac else {
            return run("ip", &["route", "replace", &cidr, "via", &node, "dev", &self.args.iface]);
        };
        let device = self.device(subnet.addr().is_ipv6());
        run("ip", &["neigh", "replace", &base, "lladdr", mac, "dev", &device, "nud", "permanent"])?;
        run("bridge", &["fdb", "replace", mac, "dst", &node, "dev", &device])?;
        run("ip", &["route", "replace", &cidr, "via", &base, "dev", &device, "onlink"])
    }

    /// What is not there any more is no failure.
    fn remove(&self, subnet: &IpNet, lease: &Lease) {
        let (cidr, base) = (subnet.to_string(), subnet.network().to_string());
        let device = self.device(subnet.addr().is_ipv6());
        if let Some(mac) = &lease.mac {
            let _ = run("ip", &["route", "del", &cidr, "via", &base, "dev", &device]);
            let _ = run("bridge", &["fdb", "del", mac, "dev", &device]);
            let _ = run("ip", &["neigh", "del", &base, "dev", &device]);
        } else if lease.key.is_some() {
            let _ = run("ip", &["route", "del", &cidr, "dev", WIREGUARD]);
        } else {
            let _ = run("ip", &["route", "del", &cidr, "via", &lease.address.to_string()]);
        }
    }
}

/// Bytes that VXLAN adds, with 20 more over IPv6.
fn overhead(address: IpAddr) -> u64 {
    if address.is_ipv6() { 70 } else { 50 }
}

/// The annotations with the data and the address of a family.
fn names(v6: bool) -> (String, String) {
    match v6 {
        false => (format!("{PREFIX}/backend-data"), format!("{PREFIX}/public-ip")),
        true => (format!("{PREFIX}/backend-v6-data"), format!("{PREFIX}/public-ipv6")),
    }
}

fn run(program: &str, arguments: &[&str]) -> Result<(), Failure> {
    output(program, arguments).map(drop)
}

fn json(program: &str, arguments: &[&str]) -> Result<Value, Failure> {
    Ok(serde_json::from_slice(&output(program, arguments)?)?)
}

fn output(program: &str, arguments: &[&str]) -> Result<Vec<u8>, Failure> {
    let output = Command::new(program).args(arguments).stdin(Stdio::null()).output()?;
    if output.status.success() {
        return Ok(output.stdout);
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(format!("{program} {}: {said}", arguments.join(" ")).into())
}
