//! Every environment variable the program reads, but for those of launchers, whose names stand in `train::launch`, and of proxies
//! (`HTTPS_PROXY` and the like), which `ureq` reads for `hub`.

/// Another host that speaks the Hub's protocol; default is the Hub itself.
pub const HF_ENDPOINT: &str = "HF_ENDPOINT";
/// Token for gated or private repositories.
pub const HF_TOKEN: &str = "HF_TOKEN";
/// Log filter, as `tracing-subscriber` reads it; `--verbose` is the short way.
pub const CYRENE_LOG: &str = "CYRENE_LOG";
/// Set to anything: no colours (no-color.org).
pub const NO_COLOR: &str = "NO_COLOR";

/// Where programs of this user keep what can be made again; `None` where the system names no such place.
pub fn cache_dir() -> Option<std::path::PathBuf> {
    let base = if cfg!(windows) {
        get("LOCALAPPDATA").map(std::path::PathBuf::from)?
    } else {
        match get("XDG_CACHE_HOME") {
            Some(dir) => dir.into(),
            None => std::path::PathBuf::from(get("HOME")?).join(".cache"),
        }
    };
    Some(base.join("cyrene"))
}

/// The value, unless unset, empty or not UTF-8.
pub fn get(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}
