use std::fs;
use std::path::Path;
use std::time::Duration;

use landfall_core::model::{Event, Kind, Object, ObjectId};
use tempfile::TempDir;

use super::{Problems, Source, manifests};

const POOL: &str = "\
apiVersion: landfall.dev/v1alpha1
kind: IPAddressPool
metadata: {name: lan}
spec:
  addresses: [10.88.0.200-10.88.0.220]
";

const SERVICE: &str = "\
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec:
  type: LoadBalancer
  ports: [{port: 80, protocol: TCP}]
";

fn mk_source(directory: &Path) -> (Source, Problems) {
    manifests(directory, &[Kind::Pool, Kind::Service]).unwrap()
}

async fn next(source: &mut Source) -> Event {
    tokio::time::timeout(Duration::from_secs(20), source.events.recv())
        .await
        .expect("an event in time")
        .expect("the source lives")
}

async fn problem(problems: &Problems) -> super::Problem {
    for _ in 0..2000 {
        if let Some(problem) = problems.list().into_iter().next() {
            return problem;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("no problem was reported");
}

#[tokio::test]
async fn reads_and_follows() {
    let directory = TempDir::new().unwrap();
    fs::write(
        directory.path().join("all.yaml"),
        format!("# both\n---\n{POOL}---\n{SERVICE}"),
    )
    .unwrap();
    let (mut source, problems) = mk_source(directory.path());
    let first = [next(&mut source).await, next(&mut source).await];
    assert!(
        matches!(&first[0], Event::Apply(Object::Service(service)) if &*service.key.namespace == "shop")
    );
    assert!(matches!(&first[1], Event::Apply(Object::Pool(pool)) if &*pool.name == "lan"));
    let synced = [next(&mut source).await, next(&mut source).await];
    assert_eq!(
        synced,
        [Event::Synced(Kind::Service), Event::Synced(Kind::Pool)]
    );

    // As editors and volumes do it: written beside, then renamed over.
    fs::write(directory.path().join(".new"), POOL).unwrap();
    fs::rename(
        directory.path().join(".new"),
        directory.path().join("all.yaml"),
    )
    .unwrap();
    assert!(matches!(
        next(&mut source).await,
        Event::Delete(ObjectId::Service(_))
    ));
    assert!(problems.list().is_empty());
}

#[tokio::test]
async fn a_broken_file_is_reported_with_its_line_and_leaves_the_rest() {
    let directory = TempDir::new().unwrap();
    fs::write(directory.path().join("pool.yaml"), POOL).unwrap();
    let (mut source, problems) = mk_source(directory.path());
    for _ in 0..3 {
        next(&mut source).await;
    }
    fs::write(
        directory.path().join("pool.yaml"),
        format!(
            "{SERVICE}---\n{}",
            POOL.replace("[10.88.0.200-10.88.0.220]", "17")
        ),
    )
    .unwrap();
    let found = problem(&problems).await;
    assert_eq!(found.line, Some(12), "{found}");
    assert!(found.to_string().contains("pool.yaml:12: "), "{found}");

    fs::write(directory.path().join("service.yaml"), SERVICE).unwrap();
    assert!(matches!(
        next(&mut source).await,
        Event::Apply(Object::Service(_))
    ));

    // Mended: nothing was lost, so nothing changes.
    fs::write(
        directory.path().join("pool.yaml"),
        POOL.replace("220", "230"),
    )
    .unwrap();
    assert!(matches!(
        next(&mut source).await,
        Event::Apply(Object::Pool(_))
    ));
    assert!(problems.list().is_empty());
}

#[tokio::test]
async fn mistakes_say_what_to_do() {
    for (text, line, expected) in [
        ("kind: Service\n", 1, "apiVersion or kind is missing"),
        (
            "\napiVersion: apps/v1\nkind: Deployment\n",
            2,
            "is not read from manifests",
        ),
        (
            &*POOL.replace("200-10.88.0.220", "9-10.88.0.1"),
            1,
            "ends before it begins",
        ),
        (
            &*SERVICE.replace("port: 80", "port: 70000"),
            1,
            "a port is 1 to 65535",
        ),
    ] {
        let directory = TempDir::new().unwrap();
        fs::write(directory.path().join("x.yaml"), text).unwrap();
        let (_source, problems) = mk_source(directory.path());
        let found = problem(&problems).await;
        assert_eq!(found.line, Some(line), "{found}");
        assert!(found.message.contains(expected), "{found}");
    }
}

#[tokio::test]
async fn the_same_object_twice_is_reported() {
    let directory = TempDir::new().unwrap();
    fs::write(directory.path().join("a.yaml"), POOL).unwrap();
    fs::write(directory.path().join("b.yaml"), POOL).unwrap();
    let (_source, problems) = mk_source(directory.path());
    let found = problem(&problems).await;
    assert!(found.file.ends_with("b.yaml"), "{found}");
}

#[test]
fn a_missing_directory_is_refused() {
    let problem = manifests(Path::new("/nonexistent"), &[]).err().unwrap();
    assert!(problem.to_string().contains("no such directory"));
}

/// The next event that is not [`Event::Synced`].
async fn next_change(source: &mut Source) -> Event {
    loop {
        let event = next(source).await;
        if !matches!(event, Event::Synced(_)) {
            return event;
        }
    }
}

#[tokio::test]
async fn what_cannot_be_read_is_tried_again() {
    let (directory, elsewhere) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    // No change of the file behind the link is seen by watching the directory.
    let file = elsewhere.path().join("pool.yaml");
    fs::write(&file, [0xff, 0xfe]).unwrap();
    std::os::unix::fs::symlink(&file, directory.path().join("pool.yaml")).unwrap();
    let (mut source, problems) = mk_source(directory.path());
    assert!(
        problem(&problems)
            .await
            .message
            .starts_with("cannot be read")
    );
    fs::write(&file, POOL).unwrap();
    let event = next_change(&mut source).await;
    assert!(matches!(event, Event::Apply(Object::Pool(_))), "{event:?}");
}

#[tokio::test]
async fn a_config_map_is_followed_through_its_link() {
    let volume = TempDir::new().unwrap();
    let at = |name: &str| volume.path().join(name);
    for (version, text) in [
        ("..1", POOL.to_owned()),
        ("..2", POOL.replace(".220", ".230")),
    ] {
        fs::create_dir(at(version)).unwrap();
        fs::write(at(version).join("pool.yaml"), text).unwrap();
    }
    std::os::unix::fs::symlink("..1", at("..data")).unwrap();
    std::os::unix::fs::symlink("..data/pool.yaml", at("pool.yaml")).unwrap();
    let (mut source, problems) = mk_source(volume.path());
    let Event::Apply(Object::Pool(before)) = next_change(&mut source).await else {
        panic!("no pool");
    };
    // As a kubelet does it: one rename changes all files.
    std::os::unix::fs::symlink("..2", at("..data_tmp")).unwrap();
    fs::rename(at("..data_tmp"), at("..data")).unwrap();
    let Event::Apply(Object::Pool(after)) = next_change(&mut source).await else {
        panic!("no pool");
    };
    assert_ne!(before.ranges, after.ranges);
    assert!(problems.list().is_empty());
}

#[tokio::test]
async fn a_misspelt_field_is_reported_with_its_line() {
    let directory = TempDir::new().unwrap();
    let text = format!("{SERVICE}---\n{POOL}  autoAsign: false\n");
    fs::write(directory.path().join("pool.yaml"), &text).unwrap();
    let (_source, problems) = mk_source(directory.path());
    let problem = problem(&problems).await.to_string();
    let line = text
        .lines()
        .position(|line| line.contains("autoAsign"))
        .unwrap()
        + 1;
    assert!(
        problem.contains(&format!("pool.yaml:{line}: ")),
        "{problem}"
    );
    assert!(
        problem.contains("spec.autoAsign: there is no such field"),
        "{problem}"
    );
}

const POLICY: &str = "\
apiVersion: landfall.dev/v1alpha1
kind: EgressPolicy
metadata: {name: mail}
spec:
  podSelector: {matchLabels: {app: mail}}
  egressIPs: {pool: lan}
  quota: {portsPerPod: 100}
";

const POD: &str = "\
apiVersion: v1
kind: Pod
metadata: {name: mx, namespace: shop, labels: {app: mail}}
spec: {nodeName: node1, containers: []}
status: {phase: Running, podIPs: [{ip: 10.244.1.7}, {ip: 'fd00:244::7'}]}
";

#[tokio::test]
async fn policies_and_their_pods_are_read() {
    let directory = TempDir::new().unwrap();
    let file = directory.path().join("egress.yaml");
    fs::write(&file, format!("{POLICY}---\n{POD}")).unwrap();
    let (mut source, problems) =
        manifests(directory.path(), &[Kind::EgressPolicy, Kind::Pod]).unwrap();
    let (policy, pod) = (next(&mut source).await, next(&mut source).await);
    assert!(
        matches!(&policy, Event::Apply(Object::EgressPolicy(policy)) if policy.spec.ports_per_pod == Some(100))
    );
    assert!(matches!(&pod, Event::Apply(Object::Pod(pod)) if pod.addresses.len() == 2));
    // What an API server would refuse is refused with its line, and the policy stays as it was.
    let wrong = POLICY.replace("{pool: lan}", "{pool: lan, addresses: [192.0.2.1]}");
    fs::write(&file, format!("# one line\n---\n{wrong}---\n{POD}")).unwrap();
    let found = problem(&problems).await;
    assert_eq!(found.line, Some(3), "{found}");
    assert!(found.message.contains("exactly one of"), "{found}");
    let wrong = POLICY.replace("portsPerPod", "portPerPod");
    fs::write(&file, format!("{wrong}---\n{POD}")).unwrap();
    for _ in 0..2000 {
        if problems.list()[0].message.contains("portPerPod") {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let found = problem(&problems).await;
    assert!(found.message.contains("spec.quota.portPerPod"), "{found}");
    assert_eq!(found.line, Some(7), "{found}");
    // The pod ends.
    let ended = POD.replace("Running", "Succeeded");
    fs::write(&file, format!("{POLICY}---\n{ended}")).unwrap();
    loop {
        match next(&mut source).await {
            Event::Synced(_) => {}
            Event::Apply(Object::Pod(pod)) => break assert!(pod.addresses.is_empty()),
            other => panic!("only the pod has changed: {other:?}"),
        }
    }
}
