//! Under which names the server answers. A page of anybody can have its own name lead to this machine ("DNS rebinding") and ask as if it were one of ours;
//! the name in `Host` is what tells it apart, for a browser sends that of the page.

use std::net::{IpAddr, Ipv6Addr};

use axum::extract::{Request, State};
use axum::http::{HeaderMap, Uri, header};
use axum::middleware::Next;
use axum::response::Response;

use crate::error::{ApiError, Error, Result};
use crate::state::AppState;

/// How a container calls the machine that it runs on.
const CONTAINER_HOST: &str = "host.docker.internal";

/// Names under which the server answers; those of this machine alone by default.
#[derive(Debug, Clone, Default)]
pub struct AllowedHosts {
    any: bool,
    /// As [`host_and_port`] gives them.
    more: Vec<String>,
}

impl AllowedHosts {
    /// Every name: what a server needs that is reached over a network by names it does not know.
    pub fn any() -> Self {
        AllowedHosts {
            any: true,
            more: Vec::new(),
        }
    }

    /// The names of this machine (`localhost` and what ends in it, `host.docker.internal`), every address written as one, and `more`, at any port.
    ///
    /// # Errors
    /// [`Error::HostName`] for what no request would name.
    pub fn this_machine_and(more: &[String]) -> Result<Self> {
        let mut allowed = AllowedHosts::default();
        for name in more {
            let written = name.trim();
            // An IPv6 address needs its brackets only where a port follows.
            let host = host_and_port(written)
                .or_else(|| host_and_port(&format!("[{written}]")).map(|(host, _)| (host, "")));
            match host {
                Some((host, "")) => allowed.more.push(host),
                _ => return Err(Error::HostName { name: name.clone() }),
            }
        }
        Ok(allowed)
    }

    fn allows(&self, authority: &str) -> bool {
        let Some((name, _)) = host_and_port(authority) else {
            return false;
        };
        // No page of anybody else has such an origin: an address is its own, and nobody can own the names below.
        name.parse::<IpAddr>().is_ok()
            || name == "localhost"
            || name.ends_with(".localhost")
            || name == CONTAINER_HOST
            || self.more.contains(&name)
    }

    /// Whether a request is for this server; if not, the name that it is for.
    fn check(&self, uri: &Uri, headers: &HeaderMap) -> std::result::Result<(), ApiError> {
        if self.any {
            return Ok(());
        }
        let mut hosts = headers.get_all(header::HOST).iter();
        let (Some(host), None) = (hosts.next(), hosts.next()) else {
            return Err(ApiError::host("no name, or several"));
        };
        let host = host.to_str().unwrap_or_default();
        // An address that is written out in the first line goes before the header.
        let written_out = uri.authority().map(|authority| authority.as_str());
        for named in [Some(host), written_out].into_iter().flatten() {
            if !self.allows(named) {
                return Err(ApiError::host(&format!("`{named}`")));
            }
        }
        Ok(())
    }
}

/// Refuses what is asked under another name.
pub(crate) async fn check(
    State(state): State<AppState>,
    request: Request,
    next: Next,
) -> std::result::Result<Response, ApiError> {
    let allowed = &state.setup().allowed_hosts;
    allowed.check(request.uri(), request.headers())?;
    Ok(next.run(request).await)
}

/// The parts of `host`, `host:port`, `[address]` or `[address]:port`: the host in lower case, without a dot at its end, addresses as they are written commonly;
/// the port with its colon, empty if there is none.
fn host_and_port(authority: &str) -> Option<(String, &str)> {
    let (host, port) = match authority.strip_prefix('[') {
        Some(rest) => {
            let (address, port) = rest.split_once(']')?;
            (address.parse::<Ipv6Addr>().ok()?.to_string(), port)
        }
        None => {
            let at = authority.find(':').unwrap_or(authority.len());
            let (name, port) = authority.split_at(at);
            let name = name.strip_suffix('.').unwrap_or(name);
            let is_name = !name.is_empty()
                && name
                    .chars()
                    .all(|c| c.is_ascii_alphanumeric() || "-._".contains(c));
            (is_name.then(|| name.to_ascii_lowercase())?, port)
        }
    };
    let is_port = match port.strip_prefix(':') {
        Some(digits) => digits.chars().all(|c| c.is_ascii_digit()),
        None => port.is_empty(),
    };
    is_port.then_some((host, port))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn allowed(more: &[&str]) -> Result<AllowedHosts> {
        let more: Vec<String> = more.iter().map(|&name| name.to_owned()).collect();
        AllowedHosts::this_machine_and(&more)
    }

    #[test]
    fn this_machines_names_are_told_from_others() {
        let allowed = allowed(&["Cyrene.lan", "192.0.2.7", "2001:db8::1"]).unwrap();
        for (host, expect) in [
            ("localhost", true),
            ("LOCALHOST:8000", true),
            ("localhost.:8000", true),
            ("localhost:", true),
            ("127.0.0.1:1", true),
            ("127.0.0.2", true),
            ("[::1]:8000", true),
            ("[0:0:0:0:0:0:0:1]", true),
            ("[::ffff:127.0.0.1]", true),
            ("cyrene.lan:8000", true),
            ("192.0.2.7", true),
            ("[2001:db8:0::1]:80", true),
            ("", false),
            (":8000", false),
            ("evil.example", false),
            ("localhost.evil.example", false),
            ("evil.localhost.example:8000", false),
            ("127.0.0.1.evil.example", false),
            ("localhost@evil.example", false),
            ("localhost:80@evil.example", false),
            ("localhost:80.evil.example", false),
            ("::1", false),
            ("[::1]x", false),
            ("[::1", false),
            ("[localhost]", false),
            ("192.0.2.8", true),
            ("[2001:db8::2]:8000", true),
            ("cyrene.localhost:8000", true),
            ("host.docker.internal:8000", true),
            ("host.docker.internal.evil.example", false),
            ("2130706433", false),
            ("cyrene.lan.evil.example", false),
            ("localhost, evil.example", false),
        ] {
            assert_eq!(allowed.allows(host), expect, "{host:?}");
        }
    }

    #[test]
    fn first_line_and_header_must_both_name_this_server() {
        let allowed = allowed(&[]).unwrap();
        let check = |uri: &str, hosts: &[&str]| {
            let mut headers = HeaderMap::new();
            for host in hosts {
                headers.append(header::HOST, host.parse().unwrap());
            }
            allowed.check(&uri.parse().unwrap(), &headers).is_ok()
        };
        assert!(check("/health", &["localhost"]));
        assert!(check("http://127.0.0.1:8000/health", &["localhost"]));
        assert!(!check("http://evil.example/health", &["localhost"]));
        assert!(!check("http://localhost/health", &["evil.example"]));
        assert!(!check("/health", &[]));
        assert!(!check("/health", &["localhost", "evil.example"]));
        assert!(!check("/health", &["localhost", "localhost"]));
        let any = AllowedHosts::any();
        assert!(any.check(&"/".parse().unwrap(), &HeaderMap::new()).is_ok());
    }

    #[test]
    fn what_is_no_name_is_refused_with_the_form() {
        for name in [
            "",
            "http://cyrene.lan",
            "cyrene.lan:8000",
            "[::1]:80",
            "*",
            "a b",
            "a/b",
        ] {
            let error = allowed(&[name]).unwrap_err().to_string();
            assert!(error.contains(&format!("`{name}`")), "{error}");
            assert!(error.contains("without scheme and port"), "{error}");
        }
        for name in ["cyrene.lan", " cyrene.lan ", "[2001:db8::1]", "2001:db8::1"] {
            assert!(allowed(&[name]).is_ok(), "{name}");
        }
    }
}
