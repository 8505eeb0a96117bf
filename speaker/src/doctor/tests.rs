#![allow(clippy::unwrap_used, reason = "tests")]

use landfall_lab::Netns;

use super::*;

/// The default of `--egress-mark`.
const EGRESS: u32 = 0x3000_0000;

fn mk_patient() -> Patient {
    Patient {
        node: "here".into(),
        uplinks: vec![Uplink {
            name: "up0".into(),
            filters: true,
            attachment: Some(Attachment::Tcx),
        }],
        delivery: Delivery::KubeProxy,
        egress_mark: Some(EGRESS),
        disarmed: false,
        gateway: State::Idle,
        unguarded: BTreeMap::new(),
        cilium: None,
        nodes: 3,
        unheard: Vec::new(),
        hears_most: true,
        is_far: false,
    }
}

fn mk_node() -> Netns {
    let node = Netns::create("doctor").unwrap();
    node.ip("link add up0 type bridge").unwrap();
    node.ip("link set up0 up").unwrap();
    node
}

/// What is found in a network namespace, but for what is about the whole machine.
fn examine(node: &Netns, patient: Patient) -> Vec<Finding> {
    let runtime = || {
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap()
    };
    let diagnosis = node.run(|| runtime().block_on(patient.examine()));
    assert_eq!(diagnosis.node, "here");
    let of_node = |finding: &Finding| !["kernel", "cpu limit"].contains(&&*finding.check);
    diagnosis.findings.into_iter().filter(of_node).collect()
}

/// The problems, as `check: what was found`; and what to do about each kind.
fn problems(findings: &[Finding]) -> Vec<String> {
    let problems = findings.iter().filter(|it| it.verdict == Verdict::Problem);
    problems
        .map(|it| {
            assert!(it.advice.is_some(), "{it:?}");
            format!("{}: {}", it.check, it.found)
        })
        .collect()
}

#[test]
fn nothing_is_wrong_with_a_node_of_its_own() {
    let node = mk_node();
    // Landfall's own, which is no other's.
    let rule = |table: &str, rule: &str| {
        let chain = format!("chain c {{\n{rule}\n}}");
        node.nft(&format!("table {table} {{\n{chain}\n}}")).unwrap();
    };
    rule("inet landfall", "meta mark set meta mark | 0x10000000");
    node.ip("rule add fwmark 0x20000000/0x20000000 lookup 7934 priority 7949")
        .unwrap();
    // Others' bits.
    rule("ip kube-proxy", "meta mark set meta mark | 0x4000");
    rule(
        "ip other",
        "meta mark 7 accept; meta mark & 0x40000000 == 0 accept",
    );
    node.ip("rule add fwmark 0x200/0xf00 lookup 2004 priority 9")
        .unwrap();
    let findings = examine(&node, mk_patient());
    assert_eq!(problems(&findings), [""; 0], "{findings:?}");
    let marks = findings.iter().find(|it| it.check == "marks").unwrap();
    assert_eq!(
        marks.found,
        "nobody else uses bits 0x30003000 of the packet mark"
    );
}

/// What is found of marks, as `verdict: what was found -> what to do`.
fn of_marks(findings: &[Finding]) -> Vec<String> {
    let marks = findings.iter().filter(|it| it.check == "marks");
    let said = marks.map(|it| {
        let advice = it.advice.as_deref().unwrap_or_default();
        format!("{:?}: {} -> {advice}", it.verdict, it.found)
    });
    said.collect()
}

/// Who compares the whole mark meets Landfall's only if it looks for Landfall's bits alone, or for all but one value.
#[test]
fn who_looks_at_the_whole_mark_is_named_if_it_would_meet_ours() {
    let said = |rule: &str| {
        let node = mk_node();
        node.ip(&format!("rule add {rule} lookup 99 priority 100"))
            .unwrap();
        node.ip("-6 rule add fwmark 0x100 lookup 99 priority 100")
            .unwrap();
        of_marks(&examine(&node, mk_patient())).join("\n")
    };
    let named = |bits: &str| {
        format!(
            "Problem: another goes by bits {bits} of the packet mark, which are Landfall's: ip -4 rule 100 -> "
        )
    };
    for (rule, bits) in [
        ("fwmark 0x20000000", "0x20000000"),
        ("fwmark 0x30000000", "0x30000000"),
        ("fwmark 0x20000000/0x20000000", "0x20000000"),
        ("fwmark 0/0x10000000", "0x10000000"),
        ("not fwmark 0x7", "0x30003000"),
    ] {
        let said = said(rule);
        assert!(said.starts_with(&named(bits)), "{rule}: {said}");
    }
    for rule in [
        "fwmark 0x20000001",
        "fwmark 0x4000/0x4000",
        "not fwmark 0x4000/0x4000",
    ] {
        let said = said(rule);
        assert!(said.starts_with("Ok: "), "{rule}: {said}");
    }
    let node = mk_node();
    let rules = "meta mark 0x20000000 accept\n meta mark 0x20000007 accept";
    node.nft(&format!(
        "table ip whole {{\n chain c {{\n {rules}\n }}\n }}"
    ))
    .unwrap();
    let said = of_marks(&examine(&node, mk_patient())).join("\n");
    let named = "Problem: another goes by bits 0x20000000 of the packet mark, which are Landfall's: table ip whole, chain c";
    assert!(said.starts_with(named), "{said}");
}

#[test]
fn who_uses_the_same_bits_is_named_by_what_it_does() {
    let node = mk_node();
    node.nft(
        "table inet mine {
            chain cali-from { meta mark set meta mark & 0xefffffff; }
            chain pre { ct mark & 0x20000000 != 0 accept; meta mark set 0x1; }
            chain post { meta mark set ct mark; meta mark & 0x0000000f vmap { 1 : accept }; }
            chain odd { meta mark != 0 accept; }
            chain several {
                meta mark & 0x10000000 . ip saddr { 0x10000000 . 192.0.2.1 } accept
                ip saddr . ct mark & 0x20000000 { 192.0.2.1 . 0x20000000 } accept
                ip saddr 192.0.2.1 socket mark 7 accept
            }
        }",
    )
    .unwrap();
    let save = "-j CONNMARK --save-mark --nfmask 0x10000000 --ctmask 0x80";
    let legacy = "-j MARK --set-xmark 0x20000000/0x20000000";
    for (tool, rule) in [("iptables-nft", save), ("iptables-legacy", legacy)] {
        node.exec(&format!("{tool} -t mangle -N ANTREA-X")).unwrap();
        node.exec(&format!(
            "{tool} -t mangle -A ANTREA-X -m mark --mark 0x0/0x10000000 {rule}"
        ))
        .unwrap();
    }
    let portmap = "iptables-nft -t nat -N CNI-HOSTPORT-SETMARK";
    node.exec(portmap).unwrap();
    let portmap = "iptables-nft -t nat -A CNI-HOSTPORT-SETMARK -j MARK --set-xmark 0x2000/0x2000";
    node.exec(portmap).unwrap();
    let found = of_marks(&examine(&node, mk_patient()));
    let pair = "start all speakers with --egress-mark=0xc0000000 (the chart's egress.mark), if no rule on the other nodes uses these";
    let none = "no other bits are free of it: move the other's";
    let answers = "Landfall needs them where answers leave by the VIP's interface and their route does not: move the other's";
    let antrea = "table ip mangle, chain ANTREA-X";
    let (packet, connection) = (
        "packet mark, which are Landfall's",
        "connection mark, which are Landfall's",
    );
    let expected = [
        format!(
            "Problem: Antrea goes by bits 0x10000000 of the {packet}: {antrea}; iptables-legacy-save table mangle, chain ANTREA-X -> {pair}"
        ),
        format!(
            "Problem: Antrea changes bits 0x20000000 of the {packet}: iptables-legacy-save table mangle, chain ANTREA-X -> {pair}"
        ),
        format!("Problem: Antrea changes bits 0x10000000 of the {connection}: {antrea} -> {pair}"),
        format!(
            "Problem: Calico changes bits 0x10000000 of the {packet}: table inet mine, chain cali-from -> {pair}"
        ),
        format!(
            "Problem: another goes by bits 0x30003000 of the {packet}: table inet mine, chain odd; table inet mine, chain several -> {none}"
        ),
        format!(
            "Problem: another goes by bits 0x30000000 of the {connection}: table inet mine, chain pre; table inet mine, chain post; table inet mine, chain several -> {none}"
        ),
        format!(
            "Problem: another changes bits 0x30003000 of the {packet}: table inet mine, chain pre; table inet mine, chain post -> {none}"
        ),
        format!(
            "Note: the CNI's portmap plugin changes bits 0x2000 of the {packet}: table ip nat, chain CNI-HOSTPORT-SETMARK -> {answers}"
        ),
    ];
    assert_eq!(found, expected);
    // Where there are no egress policies, fewer bits are Landfall's, and nothing is a problem.
    let patient = Patient {
        egress_mark: None,
        ..mk_patient()
    };
    let findings = examine(&node, patient);
    assert_eq!(problems(&findings), [""; 0]);
    assert_eq!(of_marks(&findings).len(), 3, "{:?}", of_marks(&findings));
}

#[test]
fn what_keeps_a_node_from_working_is_a_problem() {
    let node = mk_node();
    node.ip("link add kube-ipvs0 type bridge").unwrap();
    node.sysctl("net.ipv4.conf.up0.rp_filter", "1").unwrap();
    let patient = Patient {
        uplinks: vec![Uplink {
            attachment: Some(Attachment::Absent {
                reason: "no room".into(),
            }),
            ..mk_patient().uplinks.remove(0)
        }],
        gateway: State::Failed("no programs".into()),
        unheard: vec!["b".into(), "c".into()],
        hears_most: false,
        ..mk_patient()
    };
    let findings = examine(&node, patient);
    let expected = [
        "programs on up0: not attached: no room",
        "egress: this node cannot be a gateway: no programs",
        "rp_filter: up0 has no default route and filters strictly (rp_filter=1): packets of clients behind a router are dropped",
        "ipvs: kube-proxy's IPVS without strict ARP: every node answers for every VIP",
        "nodes: 2 of 3 are not heard: b; c; with less than half of those that were there this one is no gateway",
    ];
    assert_eq!(problems(&findings), expected);
    // Mended.
    for (key, value) in [
        ("net.ipv4.conf.up0.rp_filter", "2"),
        ("net.ipv4.conf.all.arp_ignore", "1"),
        ("net.ipv4.conf.all.arp_announce", "2"),
    ] {
        node.sysctl(key, value).unwrap();
    }
    let patient = Patient {
        unheard: vec!["c".into()],
        ..mk_patient()
    };
    let findings = examine(&node, patient);
    assert_eq!(problems(&findings), [""; 0], "{findings:?}");
    let nodes = findings.iter().find(|it| it.check == "nodes").unwrap();
    assert_eq!(nodes.verdict, Verdict::Note);
    let far = Patient {
        uplinks: Vec::new(),
        disarmed: true,
        is_far: true,
        ..mk_patient()
    };
    let findings = examine(&node, far);
    let found = problems(&findings);
    assert_eq!(found.len(), 1, "{found:?}");
    assert!(found[0].starts_with("egress: disarmed"), "{found:?}");
    let subnets = findings.iter().find(|it| it.check == "subnets").unwrap();
    assert_eq!(subnets.verdict, Verdict::Note);
}

#[test]
fn cilium_is_named() {
    let node = mk_node();
    let seen = |patient: Patient| {
        let findings = examine(&node, patient);
        let cilium = findings.into_iter().find(|it| it.check == "cilium");
        cilium.map(|it| it.verdict)
    };
    assert_eq!(seen(mk_patient()), None);
    node.ip("link add cilium_host type bridge").unwrap();
    assert_eq!(seen(mk_patient()), Some(Verdict::Problem));
    let without = Patient {
        egress_mark: None,
        ..mk_patient()
    };
    assert_eq!(seen(without), Some(Verdict::Note));
}

#[test]
fn who_judges_beside_cilium_needs_its_maps_and_what_it_has_not_changed() {
    let node = mk_node();
    let maps = tempfile::tempdir().unwrap();
    let patient = || Patient {
        cilium: Some(maps.path().to_owned()),
        ..mk_patient()
    };
    let said = |node: &Netns| {
        let findings = examine(node, patient());
        let cilium = findings.into_iter().find(|it| it.check == "cilium");
        let cilium = cilium.unwrap();
        assert_eq!(cilium.advice.is_some(), cilium.verdict == Verdict::Problem);
        format!("{:?}: {}", cilium.verdict, cilium.found)
    };
    assert!(said(&node).contains("no Cilium on this node"));
    node.ip("link add cilium_host type bridge").unwrap();
    assert!(said(&node).contains("its maps are not at"));
    for pin in [
        "cilium_ct4_global",
        "cilium_ct_any4_global",
        "cilium_snat_v4_external",
    ] {
        std::fs::write(maps.path().join(pin), "").unwrap();
    }
    assert!(said(&node).starts_with("Ok: "), "{}", said(&node));
    node.nft(
        "add table inet landfall
         add counter inet landfall egress-translated { packets 3 bytes 180 }",
    )
    .unwrap();
    assert!(said(&node).contains("masquerades by iptables: 3 packets"));
}

#[test]
fn an_uplink_without_guard_is_a_problem() {
    let patient = Patient {
        unguarded: [("up0".to_owned(), "no such program".to_owned())].into(),
        ..mk_patient()
    };
    let problems = problems(&examine(&mk_node(), patient));
    assert_eq!(problems, ["guard on up0: not attached: no such program"]);
}
