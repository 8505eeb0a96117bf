//! Writes the CRDs into the chart: `cargo run -p landfall-api --example crds`.

use std::path::Path;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../charts/landfall/crds");
    std::fs::create_dir_all(&directory)?;
    for crd in landfall_api::crds() {
        let file = directory.join(landfall_api::file_name(&crd));
        std::fs::write(&file, landfall_api::to_yaml(&crd)?)?;
        println!("{}", file.display());
    }
    Ok(())
}
