//! Addresses: that of the Hub or a mirror, and those that it sends on to.

use ureq::http::uri::Uri;

use crate::error::{Error, Result};
use crate::said::Said;

/// Where the Hub or a mirror is: `http` or `https`, a host, perhaps a port and a path.
#[derive(Debug, Clone)]
pub struct Endpoint {
    /// Without a slash at the end.
    base: String,
    url: Uri,
}

impl Endpoint {
    /// Reads an address.
    ///
    /// # Errors
    /// The text is no address, of another scheme, or holds a user, a query or nothing but a path.
    pub fn parse(text: &str) -> Result<Endpoint> {
        let base = text.trim().trim_end_matches('/');
        let url = base.parse::<Uri>().ok();
        let url = url.filter(|url| is_web(url) && url.query().is_none() && !base.contains('#'));
        match url {
            Some(url) => Ok(Endpoint {
                base: base.to_owned(),
                url,
            }),
            None => Err(Error::Endpoint {
                said: Said::new(text),
            }),
        }
    }

    /// The address of `path`, which begins with a slash and is percent-encoded.
    pub(crate) fn join(&self, path: &str) -> Result<Uri> {
        let address = format!("{}{path}", self.base);
        address.parse().map_err(|_| Error::Endpoint {
            said: Said::new(address),
        })
    }

    /// Whether `url` is on the same host, by the same scheme and port: there the token may go.
    pub(crate) fn is_home_of(&self, url: &Uri) -> bool {
        origin(&self.url) == origin(url)
    }
}

/// Where a redirect from `from` leads.
///
/// # Errors
/// No address, one with a user in it, or one that would go on unencrypted.
pub(crate) fn follow(from: &Uri, location: Option<&[u8]>) -> Result<Uri> {
    let refuse = |why| Error::Redirect {
        host: host(from),
        why,
        said: Said::new(String::from_utf8_lossy(location.unwrap_or_default())),
    };
    let text = location.and_then(|location| std::str::from_utf8(location).ok());
    let scheme = from.scheme_str().unwrap_or_default();
    let authority = from.authority().map_or("", |authority| authority.as_str());
    let address = match text.unwrap_or_default() {
        text if text.starts_with("//") => format!("{scheme}:{text}"),
        text if text.starts_with('/') => format!("{scheme}://{authority}{text}"),
        text => text.to_owned(),
    };
    let target = address.parse::<Uri>().ok();
    let target = target
        .filter(is_web)
        .ok_or_else(|| refuse("which is no address"))?;
    if scheme == "https" && target.scheme_str() != Some("https") {
        return Err(refuse("which is not encrypted"));
    }
    Ok(target)
}

/// The host of an address, to be shown.
pub(crate) fn host(url: &Uri) -> Said {
    Said::new(url.authority().map_or("", |authority| authority.as_str()))
}

fn is_web(url: &Uri) -> bool {
    let has_host = url
        .authority()
        .is_some_and(|authority| !authority.host().is_empty() && !authority.as_str().contains('@'));
    has_host && matches!(url.scheme_str(), Some("http" | "https"))
}

fn origin(url: &Uri) -> (Option<&str>, String, Option<u16>) {
    let scheme = url.scheme_str();
    let usual = match scheme {
        Some("https") => 443,
        _ => 80,
    };
    let host = url.host().unwrap_or_default().to_ascii_lowercase();
    (scheme, host, url.port_u16().or(Some(usual)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn url(text: &str) -> Uri {
        text.parse().unwrap()
    }

    #[test]
    fn endpoint_is_a_host_of_the_web() {
        for (text, base) in [
            ("https://hub.example", "https://hub.example"),
            ("http://127.0.0.1:8080/", "http://127.0.0.1:8080"),
            ("https://mirror.example/hf//", "https://mirror.example/hf"),
        ] {
            let endpoint = Endpoint::parse(text).unwrap();
            let joined = endpoint.join("/api/x%2Fy").unwrap();
            assert_eq!(joined.to_string(), format!("{base}/api/x%2Fy"));
        }
        for text in [
            "",
            "hub.example",
            "/api",
            "ftp://hub.example",
            "file:///etc",
            "https://",
            "https://user:secret@hub.example",
            "https://hub.example?x=1",
            "https://hub.example#x",
            "https://hub.example/a b",
        ] {
            assert!(Endpoint::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn token_stays_with_scheme_host_and_port() {
        let endpoint = Endpoint::parse("https://Hub.example/base").unwrap();
        for home in ["https://hub.example/x", "https://HUB.example:443/"] {
            assert!(endpoint.is_home_of(&url(home)), "{home}");
        }
        for away in [
            "http://hub.example/x",
            "https://hub.example:8443/x",
            "https://hub.example.evil/x",
            "https://cdn.hub.example/x",
        ] {
            assert!(!endpoint.is_home_of(&url(away)), "{away}");
        }
    }

    #[test]
    fn redirect_leads_to_an_address_as_safe_as_the_last() {
        let from = url("https://hub.example/a/b?c");
        for (location, target) in [
            ("/x/y?z", "https://hub.example/x/y?z"),
            ("//cdn.example/x", "https://cdn.example/x"),
            ("https://cdn.example:444/x", "https://cdn.example:444/x"),
        ] {
            let followed = follow(&from, Some(location.as_bytes())).unwrap();
            assert_eq!(followed.to_string(), target);
        }
        for location in [
            "http://hub.example/x",
            "HTTP://cdn.example/x",
            "https://user:secret@cdn.example/x",
            "file:///etc/passwd",
            "ftp://cdn.example/x",
            "x",
            "",
            "https:///x",
            "//",
            "/a b",
            "/a\u{1b}[2J",
        ] {
            let error = follow(&from, Some(location.as_bytes())).unwrap_err();
            assert!(!error.to_string().contains('\u{1b}'), "{error}");
        }
        assert!(follow(&from, None).is_err());
        assert!(follow(&from, Some(b"\xff")).is_err());
        assert!(follow(&url("http://a.example/"), Some(b"https://b.example/x")).is_ok());
    }
}
