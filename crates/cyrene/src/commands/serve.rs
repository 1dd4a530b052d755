//! `cyrene serve`: the API and the chat page over a model's folder. The port opens first; `/health` says `loading` until the weights are in.

use std::net::IpAddr;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::{Context, Result};
use model::Config;
use serve::{AllowedOrigins, AppState, ConnectionLimits, Limits, Setup};

use crate::cli::{Address, ModelArgs, Serve};
use crate::ui::Ui;
use crate::{interrupt, load, misuse, speak};

/// Runs the command; the error is a [`crate::ui::Misuse`] where the arguments are at fault.
pub fn run(args: &Serve, ui: &Ui) -> Result<()> {
    let api_keys = match &args.api_key_file {
        None => Vec::new(),
        Some(path) => {
            let text = match std::fs::read_to_string(path) {
                Ok(text) => text,
                Err(error) => misuse!(
                    "cannot read {}: {error}; expected one key a line",
                    path.display()
                ),
            };
            let keys: Vec<String> = text
                .lines()
                .map(str::trim)
                .filter(|line| !line.is_empty())
                .map(str::to_owned)
                .collect();
            if keys.is_empty() {
                misuse!("{} holds no key; expected one a line", path.display());
            }
            keys
        }
    };
    serve(
        &Serving {
            model: &args.model,
            address: &args.address,
            name: args.name.as_deref(),
            profile: args.profile.as_deref(),
            character: args.character.as_deref(),
            max_sequences: args.max_sequences,
            context: args.context,
            api_keys,
            allowed_origins: match AllowedOrigins::parse(&args.allow_origin) {
                Ok(origins) => origins,
                Err(error) => misuse!("--allow-origin: {error}"),
            },
        },
        ui,
    )
}

/// What to serve where.
pub struct Serving<'a> {
    /// The model and its device.
    pub model: &'a ModelArgs,
    /// Where to listen.
    pub address: &'a Address,
    /// What the API calls the model; None: its folder.
    pub name: Option<&'a str>,
    /// None: the character's, else `Adopted`.
    pub profile: Option<&'a str>,
    /// A character file in place of the persona stored with the weights.
    pub character: Option<&'a Path>,
    /// Answers at once.
    pub max_sequences: usize,
    /// Tokens of prompt and answer; None: what the model knows, but 32,768 at most.
    pub context: Option<usize>,
    /// Keys that are let in; none: everybody.
    pub api_keys: Vec<String>,
    /// Pages of other hosts that may ask.
    pub allowed_origins: AllowedOrigins,
}

/// Serves until Ctrl-C. Prints the page's address on stdout when the port is open.
///
/// # Errors
/// A folder that cannot be served, a port in use, weights that cannot be read.
pub fn serve(serving: &Serving<'_>, ui: &Ui) -> Result<()> {
    let folder = &serving.model.model;
    load::folder(folder)?;
    let device = load::device(&serving.model.device.device)?;
    let adapter = serving.model.adapter.as_deref();
    let persona = load::persona(folder, adapter, serving.character)?;
    let setup = Setup {
        model: serving
            .name
            .map_or_else(|| folder_name(folder), str::to_owned),
        chat: load::chat_encoder(folder, adapter)?,
        profiles: speak::profiles(serving.profile, &persona)?,
        persona,
        n_params: Config::load(folder)?.n_params(),
        api_keys: serving.api_keys.clone(),
        allowed_origins: serving.allowed_origins.clone(),
        limits: Limits::default(),
    };
    let state = AppState::new(setup);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("starting the server's threads")?;
    runtime.block_on(async {
        let listener = serve::bind(&serving.address.host, serving.address.port).await?;
        let address = listener.local_addr()?;
        let url = format!("http://{address}/chat");
        ui.result(&serde_json::json!({ "url": url, "host": address.ip().to_string(), "port": address.port() }), || url.clone())?;
        for warning in warnings(address.ip(), &serving.allowed_origins, &serving.api_keys) {
            ui.note(warning);
        }
        let loader = state.clone();
        let serving_model = Opening { folder: folder.clone(), adapter: serving.model.adapter.clone(), dtype: load::dtype(serving.model.dtype), device, max_sequences: serving.max_sequences, context: serving.context };
        let loading = tokio::task::spawn_blocking(move || -> Result<()> {
            loader.set_engine(serving_model.open()?);
            Ok(())
        });
        let server = serve::run(listener, serve::app(state), ConnectionLimits::default(), stopped());
        tokio::pin!(server);
        tokio::select! {
            loaded = loading => loaded.context("the loading thread ended")??,
            () = &mut server => return Ok(()),
        }
        ui.note("ready; Ctrl-C ends");
        server.await;
        Ok(())
    })
}

/// Who else can use the server, where nobody is asked for a key.
fn warnings(
    address: IpAddr,
    allowed_origins: &AllowedOrigins,
    api_keys: &[String],
) -> Vec<&'static str> {
    let mut warnings = Vec::new();
    if !api_keys.is_empty() {
        return warnings;
    }
    if !address.is_loopback() {
        warnings.push(
            "this server can be reached from other machines; --api-key-file asks them for a key",
        );
    }
    if allowed_origins.is_any() {
        warnings.push(
            "every web page that is opened in a browser here can use this server and read its answers; name the origin with --allow-origin instead, or ask for a key with --api-key-file",
        );
    }
    warnings
}

/// What the loading thread needs.
struct Opening {
    folder: std::path::PathBuf,
    adapter: Option<std::path::PathBuf>,
    dtype: kernel::DType,
    device: kernel::Device,
    max_sequences: usize,
    context: Option<usize>,
}

impl Opening {
    fn open(self) -> Result<engine::EngineHandle> {
        let mut model = model::Model::load(&self.folder, self.dtype)
            .with_context(|| format!("loading {}", self.folder.display()))?;
        if let Some(adapter) = &self.adapter {
            model
                .load_adapter(adapter)
                .with_context(|| format!("loading adapter {}", adapter.display()))?;
        }
        let model = model.to_device(self.device)?;
        let engine = eval::speak::engine(model, self.max_sequences, self.context);
        Ok(engine?)
    }
}

/// Completes after the first Ctrl-C.
async fn stopped() {
    let flag = interrupt::flag();
    while !flag.load(Ordering::SeqCst) {
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

fn folder_name(folder: &Path) -> String {
    let full = folder.canonicalize().unwrap_or_else(|_| folder.to_owned());
    full.file_name()
        .and_then(|name| name.to_str())
        .unwrap_or("cyrene")
        .to_owned()
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    #[test]
    fn server_that_asks_for_a_key_is_not_told_to_ask_for_one() {
        let n_warnings = |address: Ipv4Addr, origins: &[&str], keys: &[&str]| {
            let owned = |words: &[&str]| -> Vec<String> {
                words.iter().map(|&word| word.to_owned()).collect()
            };
            let origins = AllowedOrigins::parse(&owned(origins)).unwrap();
            warnings(address.into(), &origins, &owned(keys)).len()
        };
        assert_eq!(n_warnings(Ipv4Addr::LOCALHOST, &[], &[]), 0);
        assert_eq!(n_warnings(Ipv4Addr::UNSPECIFIED, &[], &[]), 1);
        assert_eq!(n_warnings(Ipv4Addr::UNSPECIFIED, &["*"], &[]), 2);
        assert_eq!(n_warnings(Ipv4Addr::UNSPECIFIED, &["*"], &["key"]), 0);
    }
}
