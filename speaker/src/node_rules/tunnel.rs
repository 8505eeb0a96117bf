//! The tunnel's interface.

use std::fs;

use nix::net::if_::if_nametoindex;

use super::tool::{self, ToolError};
use super::{TUNNEL, Tunnel};

/// As large as the kernel lets it be: what does not fit the path is fragmented outside.
const MTU: &str = "65000";

/// Makes the interface, if it is not there.
pub(super) async fn ensure(tunnel: &Tunnel, port: u16) -> Result<(), ToolError> {
    if !is_there() {
        let (mac, port) = (tunnel.mac.to_string(), port.to_string());
        let add = [
            "link",
            "add",
            TUNNEL,
            "mtu",
            MTU,
            "address",
            &mac,
            "type",
            "vxlan",
            "external",
            "dstport",
            &port,
            "nolearning",
            "udp6zerocsumrx",
        ];
        tool::run("ip", &add, "").await?;
        tool::run(
            "ip",
            &["link", "set", TUNNEL, "addrgenmode", "none", "up"],
            "",
        )
        .await?;
    }
    loosen();
    Ok(())
}

fn is_there() -> bool {
    if_nametoindex(TUNNEL).is_ok()
}

/// What comes out of the tunnel has sources that are reached by other interfaces: a strict reverse-path filter
/// (RFC 3704) would drop it.
fn loosen() {
    let path = |interface: &str| format!("/proc/sys/net/ipv4/conf/{interface}/rp_filter");
    let read = |interface: &str| {
        fs::read_to_string(path(interface))
            .ok()
            .and_then(|text| text.trim().parse::<u8>().ok())
            .unwrap_or(0)
    };
    if read("all").max(read(TUNNEL)) != 1 {
        return;
    }
    if let Err(error) = fs::write(path(TUNNEL), "2") {
        tracing::warn!(
            %error,
            "the reverse-path filter drops what comes from nodes off the segment: run \
             `sysctl -w net.ipv4.conf.{TUNNEL}.rp_filter=2` on this node"
        );
    }
}

/// Takes it away. It is no error if it is not there.
pub(super) async fn remove() -> Result<(), ToolError> {
    if !is_there() {
        return Ok(());
    }
    tool::run("ip", &["link", "delete", TUNNEL], "")
        .await
        .map(drop)
}
