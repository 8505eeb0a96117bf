use std::time::Duration;

use landfall_lab::Netns;
use tokio::time::timeout;

use super::*;

const PATIENCE: Duration = Duration::from_secs(10);
const KUBE_PROXY: &str = "
add table ip kube-proxy
add chain ip kube-proxy web
add map ip kube-proxy service-ips { type ipv4_addr . inet_proto . inet_service : verdict; }
add element ip kube-proxy service-ips { 10.88.0.200 . tcp . 80 comment \"web\" : goto web, 10.88.0.201 . udp . 53 : goto web }
add table ip6 kube-proxy
add chain ip6 kube-proxy web
add map ip6 kube-proxy service-ips { type ipv6_addr . inet_proto . inet_service : verdict; }
add element ip6 kube-proxy service-ips { fd00:88::200 . sctp . 9000 : goto web }
";

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// Collects events until one satisfies `last`.
async fn until(watch: &mut Watch, last: impl Fn(&Event) -> bool) -> Vec<Event> {
    let mut all = Vec::new();
    while !all.last().is_some_and(&last) {
        for event in timeout(PATIENCE, watch.next()).await.unwrap().unwrap() {
            let done = last(&event);
            all.push(event);
            if done {
                break;
            }
        }
    }
    all
}

#[test]
fn counters_are_read() {
    let netns = Netns::create("count").unwrap();
    netns
        .nft(
            "add table inet landfall\n\
             add counter inet landfall guard4 { packets 7 bytes 9 ; }\n\
             add counter inet landfall guard6\n",
        )
        .unwrap();
    let query = netns.run(Query::open).unwrap();
    let count = |name| query.counter(TableFamily::Inet, "landfall", name);
    assert_eq!(count("guard4").unwrap(), 7);
    assert_eq!(count("guard6").unwrap(), 0);
    assert_eq!(count("none").unwrap_err().kind(), io::ErrorKind::NotFound);
    assert_eq!(count("guard4").unwrap(), 7, "after an error too");
}

#[test]
fn keys_of_both_families_are_read() {
    let netns = Netns::create("keys").unwrap();
    let query = netns.run(Query::open).unwrap();
    let keys = |family| query.keys(family, "kube-proxy", "service-ips").unwrap();
    assert_eq!(keys(TableFamily::Ip), None);
    netns.nft(KUBE_PROXY).unwrap();
    let served = keys(TableFamily::Ip).unwrap();
    assert_eq!(
        served,
        Served::from([
            (ip("10.88.0.200"), Protocol::Tcp, 80),
            (ip("10.88.0.201"), Protocol::Udp, 53)
        ])
    );
    let served = keys(TableFamily::Ip6).unwrap();
    assert_eq!(
        served,
        Served::from([(ip("fd00:88::200"), Protocol::Sctp, 9000)])
    );
}

#[test]
fn ten_thousand_keys_are_read() {
    let netns = Netns::create("many").unwrap();
    netns.nft(KUBE_PROXY).unwrap();
    let elements: Vec<String> = (0..10_000)
        .map(|n| format!("10.96.{}.{} . tcp . 443 : goto web", n / 256, n % 256))
        .collect();
    netns
        .nft(&format!(
            "add element ip kube-proxy service-ips {{ {} }}\n",
            elements.join(", ")
        ))
        .unwrap();
    let query = netns.run(Query::open).unwrap();
    let served = query
        .keys(TableFamily::Ip, "kube-proxy", "service-ips")
        .unwrap()
        .unwrap();
    assert_eq!(served.len(), 10_002);
    assert!(served.contains(&(ip("10.96.39.15"), Protocol::Tcp, 443)));
}

#[test]
fn events_tell_of_keys_and_of_tables() {
    let netns = Netns::create("watch").unwrap();
    netns.block_on(async {
        let mut watch = Watch::open().unwrap();
        netns.nft(KUBE_PROXY).unwrap();
        let web = (ip("10.88.0.200"), Protocol::Tcp, 80);
        let has = |there: bool| {
            move |event: &Event| {
                matches!(event, Event::Keys { family: TableFamily::Ip, table, map, keys, there: now }
                    if table == "kube-proxy" && map == "service-ips" && *now == there && keys.contains(&web))
            }
        };
        let events = until(&mut watch, has(true)).await;
        assert_eq!(
            events[0],
            Event::Table {
                family: TableFamily::Ip,
                table: "kube-proxy".to_owned(),
                there: true
            }
        );
        netns
            .nft("delete element ip kube-proxy service-ips { 10.88.0.200 . tcp . 80 }\n")
            .unwrap();
        until(&mut watch, has(false)).await;
        netns.nft("flush ruleset\n").unwrap();
        until(&mut watch, |event| {
            matches!(event, Event::Table { family: TableFamily::Ip6, there: false, .. })
        })
        .await;
    });
}

#[test]
fn whoever_takes_from_our_table_is_told_by_port() {
    let netns = Netns::create("taken").unwrap();
    netns.block_on(async {
        netns
            .nft("add table inet landfall\nadd chain inet landfall forward\nadd rule inet landfall forward drop\n")
            .unwrap();
        let mut watch = Watch::open().unwrap();
        for script in ["flush table inet landfall", "flush ruleset"] {
            let mut child = netns.command("nft").args(script.split(' ')).spawn().unwrap();
            let port = child.id();
            assert!(child.wait().unwrap().success());
            let events = until(&mut watch, |event| matches!(event, Event::Taken { .. })).await;
            assert_eq!(
                events.last(),
                Some(&Event::Taken {
                    table: "landfall".to_owned(),
                    by: port
                })
            );
        }
    });
}

#[test]
fn nonsense_is_nothing() {
    for length in 0..40 {
        let bytes = vec![0xff; length];
        assert_eq!(
            messages(&bytes)
                .filter_map(|message| event(&message))
                .count(),
            0
        );
        assert_eq!(keys(&bytes).count(), 0);
    }
    // A message whose length is right and whose attributes are not.
    let mut bytes = vec![0; 24];
    bytes[0] = 24;
    bytes[5] = 10;
    bytes[16] = 1;
    bytes[20] = 2; // shorter than its own header
    assert_eq!(
        messages(&bytes)
            .filter_map(|message| event(&message))
            .count(),
        0
    );
}
