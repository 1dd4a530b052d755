//! `cyrene fetch`: a base model from the Hub or a mirror of it.

use std::path::Path;

use anyhow::Result;
use hub::{Fetched, Host};

use crate::cli::Fetch;
use crate::env;
use crate::ui::{Misuse, Ui, size};

/// Runs the command; the error is a [`Misuse`] where the arguments are at fault.
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
                fetched.hub_id,
                fetched.commit,
                fetched.files.len(),
                size(fetched.bytes()),
                out.display()
            )
        },
    )
}

/// Gets `hub_id` at `revision` into `out` with a progress bar, or finds it there already.
///
/// # Errors
/// As [`hub::fetch`].
pub fn fetch(hub_id: &str, revision: &str, out: &Path, ui: &Ui) -> Result<Fetched> {
    if let Some(present) = hub::fetched(hub_id, revision, out) {
        ui.note(format_args!(
            "{hub_id} is already in {} (commit {})",
            out.display(),
            present.commit
        ));
        return Ok(present);
    }
    let endpoint = env::get(env::HF_ENDPOINT);
    let token = env::get(env::HF_TOKEN);
    let host = Host {
        endpoint: endpoint.as_deref().unwrap_or("https://huggingface.co"),
        token: token.as_deref(),
    };
    let mut bar = None;
    let fetched = hub::fetch(host, hub_id, revision, out, &mut |name, got, total| {
        bar.get_or_insert_with(|| ui.bar("fetch", total))
            .set(got, name);
    });
    if let Some(bar) = bar {
        bar.finish();
    }
    fetched.map_err(|error| match error.is_misuse() {
        true => anyhow::Error::new(Misuse(error.to_string())),
        false => error.into(),
    })
}
