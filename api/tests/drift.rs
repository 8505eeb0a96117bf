//! The chart's CRDs are the ones that the types generate.

use std::path::Path;

#[test]
fn chart_carries_the_generated_crds() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../charts/landfall/crds");
    let mut expected = Vec::new();
    for crd in landfall_api::crds() {
        let name = landfall_api::file_name(&crd);
        let generated = landfall_api::to_yaml(&crd).unwrap();
        let committed = std::fs::read_to_string(directory.join(&name)).unwrap_or_default();
        assert!(
            generated == committed,
            "charts/landfall/crds/{name} is not what the API types generate: run `make crds`"
        );
        expected.push(name);
    }
    let mut found: Vec<String> = std::fs::read_dir(&directory)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    found.sort();
    assert_eq!(found, expected, "files that no type generates");
}
