//! `cyrene fetch`: a base model from the Hub or a mirror of it, resumable, every file checked by its hash, at a pinned commit.

use std::path::Path;

use anyhow::{Context, Result};
use hub::{Endpoint, Hub, HubId, Revision, Snapshot};

use crate::cli::Fetch;
use crate::ui::{Misuse, Ui, size};
use crate::{env, misuse};

/// Runs the command; the error is a [`crate::ui::Misuse`] where the arguments are at fault.
pub fn run(args: &Fetch, ui: &Ui) -> Result<()> {
    let out = args
        .out
        .clone()
        .unwrap_or_else(|| hub::default_folder(&args.hub_id));
    let fetched = fetch(&args.hub_id, &args.revision, &out, ui)?;
    ui.result(
        &serde_json::json!({ "folder": out, "fetched": fetched }),
        || {
            format!(
                "{} at {}: {} files, {} in {}",
                fetched.hub_id(),
                fetched.commit(),
                fetched.files().len(),
                size(fetched.bytes()),
                out.display()
            )
        },
    )
}

/// Gets `hub_id` at `revision` into `out`, or finds it there already.
///
/// # Errors
/// An unreachable host, a repository or revision that does not exist, a file whose hash differs (it is removed), a full disk.
pub fn fetch(hub_id: &str, revision: &str, out: &Path, ui: &Ui) -> Result<Snapshot> {
    let hub_id = of_hub(HubId::parse(hub_id))?;
    let revision = of_hub(Revision::parse(revision))?;
    if let Some(present) = Snapshot::read(out).filter(|there| there.is_of(&hub_id, &revision)) {
        ui.note(format_args!(
            "{hub_id} is already in {} (commit {})",
            out.display(),
            present.commit()
        ));
        return Ok(present);
    }
    if out.exists() {
        misuse!(
            "{} exists and is not a fetched {hub_id} at {revision}; move it away or choose another --out",
            out.display()
        );
    }
    let endpoint =
        env::get(env::HF_ENDPOINT).unwrap_or_else(|| "https://huggingface.co".to_owned());
    let token = env::get(env::HF_TOKEN);
    let hub = of_hub(Hub::new(
        &of_hub(Endpoint::parse(&endpoint))?,
        token.as_deref(),
    ))?;
    let snapshot = of_hub(hub.snapshot(&hub_id, &revision)).with_context(|| {
        format!("asking {endpoint} for {hub_id} at {revision}; check the name, the network, or set {} to a mirror ({} for a gated model)", env::HF_ENDPOINT, env::HF_TOKEN)
    })?;
    let mut bar = ui.bar("fetch", snapshot.bytes());
    of_hub(hub.fetch(&snapshot, out, &mut |progress| {
        bar.set(progress.done, progress.name.as_str());
    }))?;
    bar.finish();
    Ok(snapshot)
}

/// What `hub` reports: misuse where the user's own words are at fault, else a failure.
fn of_hub<T>(result: hub::Result<T>) -> Result<T> {
    result.map_err(|error| match error.is_misuse() {
        true => anyhow::Error::new(Misuse(error.to_string())),
        false => error.into(),
    })
}
