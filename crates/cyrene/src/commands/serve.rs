//! `cyrene serve`: the API and the chat page over a model's folder. The port opens first; `/health` says `loading` until the weights are in.

use std::net::{IpAddr, Ipv4Addr, ToSocketAddrs};
use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::{Context, Result};
use model::Config;
use serve::{AllowedHosts, AllowedOrigins, AppState, ConnectionLimits, Limits, Setup};

use crate::cli::{self, Address, ModelArgs, Serve};
use crate::ui::Ui;
use crate::{interrupt, key_file, load, misuse, speak};

/// Runs the command; the error is a [`crate::ui::Misuse`] where the arguments are at fault.
pub fn run(args: &Serve, ui: &Ui) -> Result<()> {
    let access = access(&args.access, &args.address, ui)?;
    serve(
        &Serving {
            model: &args.model,
            address: &args.address,
            name: args.name.as_deref(),
            profile: args.profile.as_deref(),
            character: args.character.as_deref(),
            max_sequences: args.max_sequences,
            context: args.context,
            access: &access,
            allowed_origins: match AllowedOrigins::parse(&args.allow_origin) {
                Ok(origins) => origins,
                Err(error) => misuse!("--allow-origin: {error}"),
            },
        },
        ui,
    )
}

/// Who may ask a server: by key, and by the name that it is asked under.
pub struct Access {
    /// Keys that are let in; none: everybody.
    api_keys: Vec<String>,
    /// Whether other machines may ask without a key.
    insecure: bool,
    /// `--allow-host`.
    allow_host: Vec<String>,
    /// As said to people.
    host: String,
}

/// Reads who may ask, and refuses what lets more in than was said; before anything that takes time.
///
/// # Errors
/// A [`crate::ui::Misuse`]: a key file without keys, a name that is none, other machines let in without a key.
pub fn access(args: &cli::Access, address: &Address, ui: &Ui) -> Result<Access> {
    let access = Access {
        api_keys: match &args.api_key_file {
            Some(path) => key_file::read(path, ui)?,
            None => Vec::new(),
        },
        insecure: args.insecure,
        allow_host: args.allow_host.clone(),
        host: address.host.clone(),
    };
    // A host that has no address is told where the port is taken.
    let addresses = (address.host.as_str(), address.port).to_socket_addrs();
    for address in addresses.into_iter().flatten() {
        access.hosts(address.ip())?;
    }
    access.hosts(Ipv4Addr::LOCALHOST.into())?;
    Ok(access)
}

impl Access {
    /// Names under which a server at `address` answers: this machine's and those given, and beyond this machine every one where none is given.
    fn hosts(&self, address: IpAddr) -> Result<AllowedHosts> {
        let is_this_machine = address.to_canonical().is_loopback();
        if !is_this_machine && self.api_keys.is_empty() && !self.insecure {
            misuse!(
                "at --host {} other machines reach this server, and it would ask nobody for a key; give --api-key-file with a file of one key a line, or --insecure if whoever reaches the port may use the model and this computer's time",
                self.host
            );
        }
        if !is_this_machine && self.allow_host.is_empty() {
            return Ok(AllowedHosts::any());
        }
        match AllowedHosts::this_machine_and(&self.allow_host) {
            Ok(hosts) => Ok(hosts),
            Err(error) => misuse!("--allow-host: {error}"),
        }
    }
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
    /// Who may ask.
    pub access: &'a Access,
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
    let config = Config::load(folder)?;
    if let Some(context) = serving.context
        && context > config.max_position_embeddings
    {
        misuse!(
            "--context is {context}, but the model in {} knows 2 to {} tokens",
            folder.display(),
            config.max_position_embeddings
        );
    }
    let device = load::device(&serving.model.device.device)?;
    let adapter = serving.model.adapter.as_deref();
    let persona = load::persona(folder, adapter, serving.character)?;
    let mut setup = Setup {
        model: serving
            .name
            .map_or_else(|| folder_name(folder), str::to_owned),
        chat: load::chat_encoder(folder, adapter)?,
        profiles: speak::profiles(serving.profile, &persona)?,
        persona,
        n_params: config.n_params(),
        api_keys: serving.access.api_keys.clone(),
        allowed_origins: serving.allowed_origins.clone(),
        allowed_hosts: AllowedHosts::default(),
        limits: Limits::default(),
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("starting the server's threads")?;
    runtime.block_on(async {
        let listener = serve::bind(&serving.address.host, serving.address.port).await?;
        let address = listener.local_addr()?;
        setup.allowed_hosts = serving.access.hosts(address.ip())?;
        let state = AppState::new(setup);
        let url = format!("http://{address}/chat");
        ui.result(&serde_json::json!({ "url": url, "host": address.ip().to_string(), "port": address.port() }), || url.clone())?;
        for warning in warnings(address.ip(), &serving.allowed_origins, &serving.access.api_keys) {
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
            "warning: other machines reach this server, and whoever does can use the model (--insecure); --api-key-file asks them for a key",
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
    use super::*;

    #[test]
    fn other_machines_are_let_in_by_key_or_by_word_only() {
        let hosts = |address: &str, key: Option<&str>, insecure: bool| {
            let access = Access {
                api_keys: key.into_iter().map(str::to_owned).collect(),
                insecure,
                allow_host: Vec::new(),
                host: address.to_owned(),
            };
            access.hosts(address.parse().unwrap())
        };
        for address in ["127.0.0.1", "127.0.0.2", "::1", "::ffff:127.0.0.1"] {
            assert!(hosts(address, None, false).is_ok(), "{address}");
        }
        for address in ["0.0.0.0", "::", "192.0.2.1", "2001:db8::1"] {
            let error = hosts(address, None, false).unwrap_err().to_string();
            for word in [address, "--api-key-file", "--insecure"] {
                assert!(error.contains(word), "{error}");
            }
            assert!(hosts(address, Some("key"), false).is_ok(), "{address}");
            assert!(hosts(address, None, true).is_ok(), "{address}");
        }
    }

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
