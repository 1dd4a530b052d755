//! Which web pages of other origins may ask this server and read its answers: what a browser wants to know before it lets them.
//! Source: the fetch standard, and for private networks the draft "Private Network Access".

use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use crate::error::{ApiError, Error, Result};
use crate::state::AppState;

/// How long a browser may keep a preflight's answer, in seconds.
const MAX_AGE_S: &str = "600";
const REQUEST_PRIVATE_NETWORK: HeaderName =
    HeaderName::from_static("access-control-request-private-network");
const ALLOW_PRIVATE_NETWORK: HeaderName =
    HeaderName::from_static("access-control-allow-private-network");

/// Origins whose pages may use the server; none by default.
#[derive(Debug, Clone, Default)]
pub struct AllowedOrigins {
    any: bool,
    list: Vec<String>,
}

impl AllowedOrigins {
    /// Reads origins as a browser names them, `*` for any.
    ///
    /// # Errors
    /// [`Error::Origin`] for what no browser would send.
    pub fn parse(origins: &[String]) -> Result<Self> {
        let mut allowed = AllowedOrigins::default();
        for origin in origins {
            match normal(origin) {
                Some(origin) if origin == "*" => allowed.any = true,
                Some(origin) => allowed.list.push(origin),
                None => {
                    return Err(Error::Origin {
                        origin: origin.clone(),
                    });
                }
            }
        }
        Ok(allowed)
    }

    /// Whether the pages of every origin may ask.
    pub fn is_any(&self) -> bool {
        self.any
    }

    fn is_none(&self) -> bool {
        !self.any && self.list.is_empty()
    }

    /// What an answer to `origin` allows; `None` if it may not ask.
    fn allows(&self, origin: &HeaderValue) -> Option<HeaderValue> {
        if self.any {
            return Some(HeaderValue::from_static("*"));
        }
        let text = origin.to_str().ok()?.to_ascii_lowercase();
        self.list.contains(&text).then(|| origin.clone())
    }
}

/// An origin as browsers write it: lower case, no path, no port that its scheme has anyway.
fn normal(origin: &str) -> Option<String> {
    let origin = origin.trim().to_ascii_lowercase();
    if origin == "*" || origin == "null" {
        return Some(origin);
    }
    let origin = origin.strip_suffix('/').unwrap_or(&origin);
    let (scheme, host) = origin.split_once("://")?;
    let usual_port = match scheme {
        "http" => ":80",
        "https" => ":443",
        _ => "",
    };
    let host = host.strip_suffix(usual_port).unwrap_or(host);
    let is_host = !host.is_empty()
        && host
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || "-._:[]".contains(c));
    let is_scheme = !scheme.is_empty()
        && scheme
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || "+-.".contains(c));
    (is_host && is_scheme).then(|| format!("{scheme}://{host}"))
}

/// Answers preflights, which carry no key, and marks every answer with what its origin may do.
pub(crate) async fn share(State(state): State<AppState>, request: Request, next: Next) -> Response {
    let allowed = &state.setup().allowed_origins;
    if allowed.is_none() {
        return next.run(request).await;
    }
    let headers = request.headers();
    let origin = headers.get(header::ORIGIN).cloned();
    let allow = origin.as_ref().and_then(|origin| allowed.allows(origin));
    let is_preflight = request.method() == Method::OPTIONS
        && origin.is_some()
        && headers.contains_key(header::ACCESS_CONTROL_REQUEST_METHOD);
    let mut response = if !is_preflight {
        next.run(request).await
    } else if allow.is_some() {
        preflight(headers)
    } else {
        ApiError::Origin.into_response()
    };
    let answer = response.headers_mut();
    if let Some(allow) = allow {
        answer.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, allow);
        let exposed = HeaderValue::from_static("retry-after");
        answer.insert(header::ACCESS_CONTROL_EXPOSE_HEADERS, exposed);
    }
    if !allowed.any {
        answer.append(header::VARY, HeaderValue::from_static("origin"));
    }
    response
}

/// What a page may send: the methods there are, and the headers that it asks for, since a `*` does not cover a key's.
fn preflight(asked: &HeaderMap) -> Response {
    let mut response = StatusCode::NO_CONTENT.into_response();
    let headers = response.headers_mut();
    headers.insert(
        header::ACCESS_CONTROL_ALLOW_METHODS,
        HeaderValue::from_static("GET, HEAD, POST"),
    );
    if let Some(names) = asked.get(header::ACCESS_CONTROL_REQUEST_HEADERS) {
        headers.insert(header::ACCESS_CONTROL_ALLOW_HEADERS, names.clone());
    }
    if asked
        .get(REQUEST_PRIVATE_NETWORK)
        .is_some_and(|value| value == "true")
    {
        headers.insert(ALLOW_PRIVATE_NETWORK, HeaderValue::from_static("true"));
    }
    headers.insert(
        header::ACCESS_CONTROL_MAX_AGE,
        HeaderValue::from_static(MAX_AGE_S),
    );
    headers.append(
        header::VARY,
        HeaderValue::from_static(
            "access-control-request-headers, access-control-request-private-network",
        ),
    );
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn origins_are_read_as_browsers_write_them() {
        for (origin, expect) in [
            ("http://localhost:3000", Some("http://localhost:3000")),
            ("HTTP://Localhost:3000/", Some("http://localhost:3000")),
            ("https://example.org:443", Some("https://example.org")),
            ("http://[::1]:8080", Some("http://[::1]:8080")),
            ("app://obsidian.md", Some("app://obsidian.md")),
            ("null", Some("null")),
            ("*", Some("*")),
            ("localhost:3000", None),
            ("http://", None),
            ("http://example.org/page", None),
            ("http://*.example.org", None),
            ("", None),
        ] {
            assert_eq!(normal(origin).as_deref(), expect, "{origin}");
        }
    }

    #[test]
    fn what_is_no_origin_is_refused_with_the_form() {
        let error = AllowedOrigins::parse(&["localhost:3000".to_owned()]).unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains("localhost:3000") && text.contains("http://"),
            "{text}"
        );
    }
}
