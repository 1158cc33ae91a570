//! TLS to a monitor, or a guest agent, over TCP.
//!
//! The credentials are files in a directory, named as QEMU's own clients have them
//! (`tls-creds-x509`, `tls-creds-psk`). Nothing of them is in an argument or a log.

use std::fmt;
use std::fs::File;
use std::io::{self, ErrorKind, Read};
use std::path::{Path, PathBuf};
use std::pin::Pin;

use openssl::ssl::{
    SslConnector, SslConnectorBuilder, SslFiletype, SslMethod, SslVerifyMode, SslVersion,
};
use openssl::x509::X509;
use openssl::x509::store::X509StoreBuilder;
use serde::{Deserialize, Serialize};
use tokio::net::TcpStream;
use tokio_openssl::SslStream;

/// Longest file of credentials.
const FILE_MAX: u64 = 1 << 20;

/// Who we are, and whom we trust.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Credentials {
    /// Certificates: `ca-cert.pem`, and `client-cert.pem` with `client-key.pem` where there are
    /// any. The server's must be of that CA, and for the address that is connected to.
    X509 {
        /// The directory.
        dir: PathBuf,
    },
    /// A key that both know: a line `USER:HEX` of `keys.psk`.
    Psk {
        /// The directory.
        dir: PathBuf,
        /// The user.
        user: String,
    },
}

impl Credentials {
    /// Reads `x509=/dir` or `psk=user:/dir`.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let absolute = |dir: &str| {
            let is_path = dir.starts_with('/') && !dir.contains('\0');
            is_path.then(|| PathBuf::from(dir))
        };
        if let Some(dir) = text.strip_prefix("x509=") {
            return Some(Self::X509 {
                dir: absolute(dir)?,
            });
        }
        let (user, dir) = text.strip_prefix("psk=")?.split_once(':')?;
        let is_name = !user.is_empty() && !user.contains(|sign: char| sign.is_control());
        is_name.then(|| {
            Some(Self::Psk {
                dir: absolute(dir)?,
                user: user.to_owned(),
            })
        })?
    }
}

impl fmt::Display for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::X509 { dir } => write!(f, "x509={}", dir.display()),
            Self::Psk { dir, user } => write!(f, "psk={user}:{}", dir.display()),
        }
    }
}

/// Encrypts a connection to `address` (`host:port`), once both sides have shown who they are.
///
/// # Errors
/// [`ErrorKind::InvalidInput`] for credentials that are none; else what TLS says.
pub(super) async fn connect(
    stream: TcpStream,
    address: &str,
    credentials: &Credentials,
) -> io::Result<SslStream<TcpStream>> {
    let host = address.rsplit_once(':').map_or(address, |(host, _)| host);
    let host = host.trim_matches(['[', ']']);
    let credentials = credentials.clone();
    // Files may hang.
    let connector = tokio::task::spawn_blocking(move || match &credentials {
        Credentials::X509 { dir } => x509(dir),
        Credentials::Psk { dir, user } => psk(dir, user),
    });
    let connector = connector.await.map_err(io::Error::other)??;
    let ssl = connector.build().configure()?.into_ssl(host)?;
    let mut stream = SslStream::new(ssl, stream)?;
    match Pin::new(&mut stream).connect().await {
        Ok(()) => Ok(stream),
        Err(error) => {
            let verified = stream.ssl().verify_result();
            let why = if verified == openssl::x509::X509VerifyResult::OK {
                error.to_string()
            } else {
                format!("the server's certificate: {verified}")
            };
            Err(io::Error::new(ErrorKind::PermissionDenied, why))
        }
    }
}

fn builder() -> io::Result<SslConnectorBuilder> {
    let mut builder = SslConnector::builder(SslMethod::tls_client())?;
    builder.set_min_proto_version(Some(SslVersion::TLS1_2))?;
    // Not the system's: whom we trust is in the directory alone.
    builder.set_cert_store(X509StoreBuilder::new()?.build());
    builder.set_verify(SslVerifyMode::PEER);
    Ok(builder)
}

fn x509(dir: &Path) -> io::Result<SslConnectorBuilder> {
    if dir.join("ca-crl.pem").exists() {
        // Not to be passed over in silence.
        return Err(invalid(dir, "ca-crl.pem", "revocation lists are not read"));
    }
    let mut trusted = X509StoreBuilder::new()?;
    for certificate in X509::stack_from_pem(&read(dir, "ca-cert.pem")?)? {
        trusted.add_cert(certificate)?;
    }
    let mut builder = builder()?;
    builder.set_cert_store(trusted.build());
    let certificate = dir.join("client-cert.pem");
    if certificate.exists() {
        builder.set_certificate_chain_file(&certificate)?;
        builder.set_private_key_file(dir.join("client-key.pem"), SslFiletype::PEM)?;
        builder.check_private_key()?;
    }
    Ok(builder)
}

fn psk(dir: &Path, user: &str) -> io::Result<SslConnectorBuilder> {
    let keys = read(dir, "keys.psk")?;
    let line = keys
        .split(|byte| *byte == b'\n')
        .filter_map(|line| line.strip_prefix(user.as_bytes())?.strip_prefix(b":"))
        .next()
        .ok_or_else(|| invalid(dir, "keys.psk", "it has no key of this user"))?;
    let key = hex(line.trim_ascii_end())
        .ok_or_else(|| invalid(dir, "keys.psk", "this user's key is not hexadecimal"))?;
    let identity = [user.as_bytes(), b"\0"].concat();
    // A server that shows a certificate instead finds nobody who trusts it.
    let mut builder = builder()?;
    builder.set_cipher_list("ECDHEPSK:DHEPSK:PSK:!NULL:!aNULL:@STRENGTH")?;
    builder.set_psk_client_callback(move |_ssl, _hint, to_identity, to_key| {
        // With no key the handshake fails.
        let (Some(name), Some(bytes)) = (
            to_identity.get_mut(..identity.len()),
            to_key.get_mut(..key.len()),
        ) else {
            return Ok(0);
        };
        name.copy_from_slice(&identity);
        bytes.copy_from_slice(&key);
        Ok(key.len())
    });
    Ok(builder)
}

fn hex(digits: &[u8]) -> Option<Vec<u8>> {
    let text = std::str::from_utf8(digits).ok()?;
    let is_hex = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    if !is_hex || text.len() % 2 != 0 {
        return None;
    }
    (0..text.len())
        .step_by(2)
        .map(|at| u8::from_str_radix(&text[at..at + 2], 16).ok())
        .collect()
}

fn read(dir: &Path, name: &str) -> io::Result<Vec<u8>> {
    let unreadable = |error: io::Error| invalid(dir, name, error);
    let mut bytes = Vec::new();
    let file = File::open(dir.join(name)).map_err(unreadable)?;
    file.take(FILE_MAX + 1)
        .read_to_end(&mut bytes)
        .map_err(unreadable)?;
    if bytes.len() as u64 > FILE_MAX {
        return Err(invalid(dir, name, "it is too long"));
    }
    Ok(bytes)
}

fn invalid(dir: &Path, name: &str, why: impl fmt::Display) -> io::Error {
    let path = dir.join(name);
    io::Error::new(
        ErrorKind::InvalidInput,
        format!("{}: {why}", path.display()),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_hexadecimal() {
        assert_eq!(hex(b"00fF10"), Some(vec![0, 255, 16]));
        for odd in ["", "0", "0g", "+1", "é0"] {
            assert_eq!(hex(odd.as_bytes()), None, "{odd}");
        }
    }

    #[test]
    fn a_users_key_is_found() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(
            folder.path().join("keys.psk"),
            "qemux:01\nqemu:0203\r\nodd:xy\n",
        )
        .unwrap();
        psk(folder.path(), "qemu").unwrap();
        for (user, why) in [("qem", "no key"), ("odd", "hexadecimal")] {
            let Err(error) = psk(folder.path(), user) else {
                panic!("{user} has a key");
            };
            assert_eq!(error.kind(), ErrorKind::InvalidInput);
            assert!(error.to_string().contains(why), "{error}");
        }
        let Err(missing) = psk(&folder.path().join("none"), "qemu") else {
            panic!("a key of nowhere");
        };
        assert!(missing.to_string().contains("keys.psk"), "{missing}");
    }
}
