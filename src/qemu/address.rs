//! Where a monitor is.

use std::fmt;
use std::path::PathBuf;

use crate::error::{Error, Kind, Result};

/// The address of a QMP monitor.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Address {
    /// A unix socket.
    Unix(PathBuf),
    /// A TCP address, as `host:port` (`[::1]:4444` for IPv6).
    Tcp(String),
}

impl Address {
    /// Reads `unix:/path`, an absolute path, or `tcp:host:port`.
    ///
    /// # Errors
    /// [`Kind::InvalidRequest`].
    pub fn parse(text: &str) -> Result<Self> {
        let invalid = || {
            Error::new(
                Kind::InvalidRequest,
                format!("reading the monitor's address {text:?}"),
            )
            .because("it is unix:/path, an absolute path, or tcp:host:port")
        };
        let path = text.strip_prefix("unix:").unwrap_or(text);
        if path.starts_with('/') && !path.contains('\0') {
            return Ok(Self::Unix(PathBuf::from(path)));
        }
        let address = text.strip_prefix("tcp:").ok_or_else(invalid)?;
        let (host, port) = address.rsplit_once(':').ok_or_else(invalid)?;
        if host.is_empty() || port.parse::<u16>().is_err() {
            return Err(invalid());
        }
        Ok(Self::Tcp(address.to_owned()))
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Tcp(address) => write!(f, "tcp:{address}"),
        }
    }
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
        for odd in [
            "",
            "run/a",
            "unix:run/a",
            "tcp:host",
            "tcp::1",
            "tcp:host:x",
            "tcp:host:70000",
            "fd:3",
            "/a\0b",
        ] {
            assert_eq!(
                Address::parse(odd).unwrap_err().kind(),
                Kind::InvalidRequest,
                "{odd:?}"
            );
        }
    }
}
