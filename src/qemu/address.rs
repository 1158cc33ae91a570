//! Where a monitor, or a guest agent, is.

use std::fmt;
use std::io;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use tokio::net::TcpStream;

use crate::error::{Error, Kind, Result};
use crate::qemu::tls::Credentials;

/// Longest path of a unix socket on Linux (unix(7)).
const MAX_PATH_BYTES: usize = 107;

/// The address of a socket of QEMU's: a monitor, or a guest agent.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Address {
    /// A unix socket.
    Unix(PathBuf),
    /// A TCP address, as `host:port` (`[::1]:4444` for IPv6).
    Tcp(String),
    /// TLS over TCP.
    Tls {
        /// As [`Address::Tcp`].
        address: String,
        /// How both sides show who they are.
        credentials: Credentials,
    },
}

impl Address {
    /// Reads `unix:/path`, an absolute path, `tcp:host:port`, or `tls:host:port?` with `x509=/dir`
    /// or `psk=user:/dir`.
    ///
    /// # Errors
    /// [`Kind::InvalidRequest`].
    pub fn parse(text: &str) -> Result<Self> {
        let invalid = || {
            Error::new(
                Kind::InvalidRequest,
                format!("reading the address {text:?}"),
            )
            .because(format!(
                "it is unix:/path, an absolute path, tcp:host:port, tls:host:port?x509=/dir or \
                 tls:host:port?psk=user:/dir; a socket's path has at most {MAX_PATH_BYTES} bytes"
            ))
        };
        let path = text.strip_prefix("unix:").unwrap_or(text);
        if path.starts_with('/') && !path.contains('\0') && path.len() <= MAX_PATH_BYTES {
            return Ok(Self::Unix(PathBuf::from(path)));
        }
        let (address, credentials) = match text.strip_prefix("tls:") {
            Some(rest) => {
                let (address, credentials) = rest.split_once('?').ok_or_else(invalid)?;
                let credentials = Credentials::parse(credentials).ok_or_else(invalid)?;
                (address, Some(credentials))
            }
            None => (text.strip_prefix("tcp:").ok_or_else(invalid)?, None),
        };
        let (host, port) = address.rsplit_once(':').ok_or_else(invalid)?;
        // Without brackets the end of an IPv6 address would be read as a port.
        let bracketed = host.starts_with('[') && host.ends_with(']');
        let named = !host.is_empty() && (bracketed || !host.contains([':', '[', ']']));
        if !named || !port.parse::<u16>().is_ok_and(|port| port > 0) {
            return Err(invalid());
        }
        let address = address.to_owned();
        Ok(match credentials {
            Some(credentials) => Self::Tls {
                address,
                credentials,
            },
            None => Self::Tcp(address),
        })
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Tcp(address) => write!(f, "tcp:{address}"),
            Self::Tls {
                address,
                credentials,
            } => write!(f, "tls:{address}?{credentials}"),
        }
    }
}

/// Connects to `host:port`.
pub(super) async fn tcp(address: &str) -> io::Result<TcpStream> {
    let stream = TcpStream::connect(address).await?;
    // Each command waits for its answer: delaying it gains nothing.
    stream.set_nodelay(true)?;
    Ok(stream)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_these_forms() {
        assert_eq!(
            Address::parse("/run/a").unwrap(),
            Address::Unix("/run/a".into())
        );
        assert_eq!(
            Address::parse("unix:/run/a").unwrap(),
            Address::Unix("/run/a".into())
        );
        assert_eq!(
            Address::parse("tcp:[::1]:4444").unwrap(),
            Address::Tcp("[::1]:4444".into())
        );
        for text in ["tls:host:1?x509=/a?b", "tls:[::1]:1?psk=user:/a:b"] {
            let address = Address::parse(text).unwrap();
            assert!(matches!(address, Address::Tls { .. }));
            assert_eq!(address.to_string(), text);
        }
        for odd in [
            "",
            "run/a",
            "unix:run/a",
            "tcp:host",
            "tcp::1",
            "tcp:host:x",
            "tcp:host:70000",
            "tcp:host:0",
            "tcp:::1:4444",
            "tcp:[::1:4444",
            "fd:3",
            "tls:host:1",
            "tls:host:1?",
            "tls:host:1?x509=dir",
            "tls:host?x509=/dir",
            "tls:host:1?psk=/dir",
            "tls:host:1?psk=:/dir",
            "tls:host:1?psk=user:dir",
            "tls:host:1?psk=us\ner:/dir",
            "/a\0b",
            &format!("/{}", "a".repeat(MAX_PATH_BYTES)),
        ] {
            assert_eq!(
                Address::parse(odd).unwrap_err().kind(),
                Kind::InvalidRequest,
                "{odd:?}"
            );
        }
    }
}
