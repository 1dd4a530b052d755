//! Requests to the Hub or a mirror: timeouts, redirects that are looked at, and a token that goes to one host.
//!
//! Proxies are those that `ureq` finds (`HTTPS_PROXY` and the like).

use std::io::Read;
use std::time::Duration;

use ureq::http::{HeaderValue, Response, StatusCode, Uri, header};
use ureq::{Agent, Body};

use crate::endpoint::{Endpoint, follow, host};
use crate::error::{Error, Result};
use crate::retry::Patience;
use crate::said::Said;

const MAX_REDIRECTS: u32 = 10;
/// For finding a host and connecting to it.
const CONNECT: Duration = Duration::from_secs(10);
/// Without a byte from the server, and for all of its headers. A whole file may take as long as it likes.
const SILENCE: Duration = Duration::from_secs(30);

/// For the body of an answer that is no file: 16 MiB at 56 KB/s.
const WHOLE_ANSWER: Duration = Duration::from_secs(300);

/// Some bytes of a file, the last one included.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Range {
    pub first: u64,
    pub last: u64,
}

/// Speaks with one endpoint.
#[derive(Debug)]
pub(crate) struct Client {
    agent: Agent,
    endpoint: Endpoint,
    token: Option<HeaderValue>,
}

/// An answer that says yes: status 200 or 206.
pub(crate) struct Answer {
    /// Who gave it, after redirects.
    pub host: Said,
    pub is_partial: bool,
    content_range: Option<HeaderValue>,
    body: Body,
}

impl Client {
    /// # Errors
    /// A token that no header can hold.
    pub fn new(endpoint: &Endpoint, token: Option<&str>) -> Result<Client> {
        let token = token.map(bearer).transpose()?;
        let config = Agent::config_builder()
            .user_agent(concat!("cyrene/", env!("CARGO_PKG_VERSION")))
            // They are followed here.
            .max_redirects(0)
            .http_status_as_error(false)
            .timeout_resolve(Some(CONNECT))
            .timeout_connect(Some(CONNECT))
            .timeout_recv_response(Some(SILENCE))
            .timeout_per_read(Some(SILENCE))
            .timeout_per_write(Some(SILENCE));
        Ok(Client {
            agent: config.build().new_agent(),
            endpoint: endpoint.clone(),
            token,
        })
    }

    /// The body at `path`, which holds `limit` bytes at most; tried again where that may help.
    ///
    /// # Errors
    /// No way to the server, another status, a larger body.
    pub fn get_all(&self, path: &str, limit: u64) -> Result<Vec<u8>> {
        let mut patience = Patience::new();
        loop {
            match self.get(path, None).and_then(|answer| answer.all(limit)) {
                Ok(bytes) => return Ok(bytes),
                Err(error) => patience.bear(error)?,
            }
        }
    }

    /// What is at `path`, or some bytes of it.
    ///
    /// # Errors
    /// No way to the server, a redirect that is not followed, another status.
    pub fn get(&self, path: &str, range: Option<Range>) -> Result<Answer> {
        let mut url = self.endpoint.join(path)?;
        for _ in 0..=MAX_REDIRECTS {
            let response = self.ask(&url, range)?;
            if !is_redirect(response.status()) {
                return answer(&url, response);
            }
            let location = response.headers().get(header::LOCATION);
            url = follow(&url, location.map(HeaderValue::as_bytes))?;
        }
        Err(Error::Redirects {
            host: host(&url),
            limit: MAX_REDIRECTS,
        })
    }

    fn ask(&self, url: &Uri, range: Option<Range>) -> Result<Response<Body>> {
        let mut request = self.agent.get(url);
        request = match range {
            Some(Range { first, last }) => {
                request.header(header::RANGE, format!("bytes={first}-{last}"))
            }
            None => {
                let limited = request.config().timeout_recv_body(Some(WHOLE_ANSWER));
                limited.build()
            }
        };
        if let Some(token) = &self.token
            && self.endpoint.is_home_of(url)
        {
            request = request.header(header::AUTHORIZATION, token);
        }
        request.call().map_err(|error| Error::Unreachable {
            host: host(url),
            passing: matches!(
                error,
                ureq::Error::Io(_)
                    | ureq::Error::Timeout(_)
                    | ureq::Error::HostNotFound
                    | ureq::Error::ConnectionFailed
            ),
            said: Said::new(error),
        })
    }
}

impl Answer {
    /// Bytes that the body has, where a header says so.
    pub fn length(&self) -> Option<u64> {
        self.body.content_length()
    }

    /// Whether the bytes are part of those that were asked for, from the first of them on, of a file of `size` bytes; how many.
    ///
    /// # Errors
    /// `Content-Range` says otherwise, or is missing.
    pub fn part_of(&self, asked: Range, size: u64) -> Result<u64> {
        let said = self.content_range.as_ref().map(HeaderValue::as_bytes);
        let said = String::from_utf8_lossy(said.unwrap_or_default());
        match content_range(&said) {
            Some((got, total))
                if got.first == asked.first
                    && (got.first..=asked.last).contains(&got.last)
                    && total.is_none_or(|total| total == size) =>
            {
                Ok(got.last - got.first + 1)
            }
            _ => Err(Error::Range {
                host: self.host.clone(),
                first: asked.first,
                last: asked.last,
                said: Said::new(said),
            }),
        }
    }

    /// The body as it comes: it may end early, or never.
    pub fn reader(self) -> impl Read {
        self.body.into_reader()
    }

    fn all(self, limit: u64) -> Result<Vec<u8>> {
        let host = self.host.clone();
        let expected = self.length();
        if expected.is_some_and(|length| length > limit) {
            return Err(Error::AnswerTooLarge { limit });
        }
        let mut bytes = Vec::new();
        let read = self.reader().take(limit + 1).read_to_end(&mut bytes);
        let got = bytes.len() as u64;
        match read {
            Err(error) => Err(Error::Cut {
                host,
                got,
                expected: expected.unwrap_or(limit),
                said: Said::new(error),
            }),
            Ok(_) if got > limit => Err(Error::AnswerTooLarge { limit }),
            Ok(_) => Ok(bytes),
        }
    }
}

fn bearer(token: &str) -> Result<HeaderValue> {
    let value = HeaderValue::from_str(&format!("Bearer {}", token.trim()));
    let mut value = value.map_err(|_| Error::Token)?;
    value.set_sensitive(true);
    Ok(value)
}

fn is_redirect(status: StatusCode) -> bool {
    matches!(status.as_u16(), 301 | 302 | 303 | 307 | 308)
}

fn answer(url: &Uri, response: Response<Body>) -> Result<Answer> {
    let host = host(url);
    let is_partial = match response.status() {
        StatusCode::OK => false,
        StatusCode::PARTIAL_CONTENT => true,
        status => {
            let status = status.as_u16();
            return Err(Error::Status { host, status });
        }
    };
    Ok(Answer {
        host,
        is_partial,
        content_range: response.headers().get(header::CONTENT_RANGE).cloned(),
        body: response.into_body(),
    })
}

/// Range and whole size of `bytes 0-9/100`; of `bytes 0-9/*` no size.
fn content_range(text: &str) -> Option<(Range, Option<u64>)> {
    let (range, total) = text.strip_prefix("bytes ")?.split_once('/')?;
    let (first, last) = range.split_once('-')?;
    let range = Range {
        first: number(first)?,
        last: number(last)?,
    };
    match total {
        "*" => Some((range, None)),
        total => Some((range, Some(number(total)?))),
    }
}

/// Digits alone: the standard library would take a plus as well.
fn number(digits: &str) -> Option<u64> {
    let is_number = digits.bytes().all(|byte| byte.is_ascii_digit());
    digits.parse().ok().filter(|_| is_number)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_range_is_read_by_the_letter() {
        let range = |first, last| Range { first, last };
        for (text, expected) in [
            ("bytes 0-9/100", Some((range(0, 9), Some(100)))),
            ("bytes 5-5/*", Some((range(5, 5), None))),
            ("bytes */100", None),
            ("bytes 0-9", None),
            ("bytes +0-9/100", None),
            ("bytes -1-9/100", None),
            ("bytes 0-99999999999999999999/100", None),
            ("items 0-9/100", None),
            ("", None),
        ] {
            assert_eq!(content_range(text), expected, "{text}");
        }
    }

    #[test]
    fn token_that_would_break_the_header_is_refused() {
        let endpoint = Endpoint::parse("http://127.0.0.1:9").unwrap();
        assert!(Client::new(&endpoint, Some("hf_abc\n")).is_ok());
        let broken = Client::new(&endpoint, Some("hf_\r\nhost: evil"));
        assert!(matches!(broken, Err(Error::Token)));
    }
}
