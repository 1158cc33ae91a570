//! Targets that are NBD servers, and the receiver, which is one.
//!
//! ```text
//! connected --> negotiated by us --------------------------> QEMU welcomed --> bytes relayed
//!           \-> TLS agreed by us, if it is wanted --> the same for QEMU --/
//! ```
//! QEMU stands still while it negotiates with a server, and its guest with it. So we do that,
//! with all patience, and then tell QEMU what we have found. Of TLS we know nothing: what
//! follows on it is between QEMU and the server, and gets little time.

use std::io::ErrorKind;
use std::path::PathBuf;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::oneshot;
use tokio_util::task::AbortOnDropHandle;

use crate::error::{Error, Kind, Result};
use crate::nbd::serve::{self, Offered, Served};
use crate::nbd::{negotiate_simple, start_tls};
use crate::offer::Offer;
use crate::qemu::step;
use crate::relay::{Hangup, Socket, Stream, relay};
use crate::target::{Opened, Opening, refused};
use crate::teardown::{Teardown, Undo};

/// How long QEMU may stand still for a server that is slow behind TLS.
const HANDSHAKE: Duration = Duration::from_secs(2);

/// Where an NBD server is.
pub enum NbdServer {
    /// At a unix socket.
    Unix(PathBuf),
    /// At `host:port`.
    Tcp(String),
    /// At the other end.
    Connected(Socket),
}

/// How QEMU encrypts its connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Tls {
    /// By certificates, in this directory; the server's has this name.
    X509 {
        /// As QEMU's `tls-creds-x509` has it.
        dir: String,
        /// The server's name.
        hostname: Option<String>,
    },
    /// By a pre-shared key, in this directory, of this user.
    Psk {
        /// As QEMU's `tls-creds-psk` has it.
        dir: String,
        /// The user.
        username: String,
    },
}

/// What was agreed with a server.
enum Agreed {
    /// All, of an export like this.
    Export(Offered),
    /// That TLS follows.
    Tls,
}

impl Opening<'_> {
    /// Opens the server's export `export`.
    pub(super) async fn server(
        &self,
        server: NbdServer,
        export: &str,
        tls: Option<Tls>,
        teardown: &mut Teardown,
    ) -> Result<Opened> {
        let hostname = match &server {
            NbdServer::Tcp(address) => address
                .rsplit_once(':')
                .map(|(host, _)| host.trim_matches(['[', ']']).to_owned()),
            _ => None,
        };
        let (mut server, hangup, agreed) = self.agree(server, export, tls.is_some()).await?;
        let credentials = match tls {
            Some(tls) => Some(self.credentials(tls, hostname, teardown).await?),
            None => None,
        };
        let offer = Offer::make(self.qmp, self.runtime_dir, teardown).await?;
        let relayed = async move {
            let _until_then = hangup;
            let qemu = offer.door.open().await;
            let mut qemu =
                qemu.map_err(|error| Error::new(Kind::NbdClosed, "awaiting QEMU").because(error))?;
            let mut qemu = match agreed {
                Agreed::Export(offered) => Served::welcome(qemu, offered).await?.into_stream(),
                Agreed::Tls => {
                    serve::welcome_tls(&mut qemu).await?;
                    qemu
                }
            };
            let relayed = relay(&mut qemu, &mut *server).await;
            relayed.map_err(|error| Error::new(Kind::NbdClosed, "relaying").because(error))
        };
        let relay = tokio::spawn(async move {
            if let Err(error) = relayed.await {
                tracing::debug!(
                    error = error.chain(),
                    "the connection to a push target broke"
                );
            }
        });
        let mut node = step::target_server(self.names, &offer.server, export);
        if let Some((id, hostname)) = credentials {
            node["tls-creds"] = json!(id);
            if let Some(hostname) = hostname {
                node["tls-hostname"] = json!(hostname);
            }
        }
        let opened = Opened {
            relay: Some(AbortOnDropHandle::new(relay)),
            ..Opened::default()
        };
        self.add_server(node, &opened, teardown).await?;
        Ok(opened)
    }

    /// Connects and negotiates.
    async fn agree(
        &self,
        server: NbdServer,
        export: &str,
        tls: bool,
    ) -> Result<(Box<dyn Stream>, Option<Hangup>, Agreed)> {
        let unreachable = || Error::new(Kind::TargetUnreachable, "connecting to the target");
        let agreed = async {
            let connected = connect(server).await;
            let (mut stream, hangup) = connected.map_err(|error| match error.kind() {
                ErrorKind::ResourceBusy => {
                    Error::new(Kind::TargetRefused, "connecting to the target").because(error)
                }
                _ => unreachable().because(error),
            })?;
            let agreed = if tls {
                start_tls(&mut stream).await.map(|()| Agreed::Tls)
            } else {
                let export = negotiate_simple(&mut stream, export).await;
                export.map(|export| Agreed::Export(Offered::of(&export)))
            };
            match agreed {
                Ok(agreed) => Ok((stream, hangup, agreed)),
                Err(error) if error.kind() == Kind::NbdClosed => Err(unreachable().because(error)),
                Err(error) if error.kind() == Kind::InvalidRequest => Err(error),
                Err(error) => {
                    Err(Error::new(Kind::TargetRefused, "connecting to the target").because(error))
                }
            }
        };
        let agreed = async {
            let agreed = tokio::time::timeout(self.timeout, agreed).await;
            agreed.unwrap_or_else(|_elapsed| {
                Err(unreachable().because(format!("no answer within {:?}", self.timeout)))
            })
        };
        self.unless_cancelled(agreed).await
    }

    async fn add_server(
        &self,
        node: Value,
        opened: &Opened,
        teardown: &mut Teardown,
    ) -> Result<()> {
        teardown.push(Undo::Node {
            node: self.names.target(),
        });
        // The time that others take is not the server's.
        let turn = self.unless_cancelled(async { Ok(self.qmp.turn().await) });
        let turn = turn.await?;
        let add = turn.execute_raw("blockdev-add", node);
        tokio::pin!(add);
        let added = tokio::select! {
            added = &mut add => added,
            () = tokio::time::sleep(HANDSHAKE) => {
                opened.cut();
                let _refused = add.await;
                return Err(Error::new(Kind::TargetTimeout, "opening the target")
                    .because(format!("its server says nothing for {HANDSHAKE:?}")));
            }
        };
        added.map(drop).map_err(refused)
    }

    /// The id of the credentials, and the server's name.
    async fn credentials(
        &self,
        tls: Tls,
        address: Option<String>,
        teardown: &mut Teardown,
    ) -> Result<(String, Option<String>)> {
        let id = self.names.credentials();
        teardown.push(Undo::Object { id: id.clone() });
        let (object, hostname) = match tls {
            Tls::X509 { dir, hostname } => (
                json!({"qom-type": "tls-creds-x509", "id": id, "dir": dir, "endpoint": "client",
                    "verify-peer": true}),
                hostname.or(address),
            ),
            Tls::Psk { dir, username } => (
                json!({"qom-type": "tls-creds-psk", "id": id, "dir": dir, "endpoint": "client",
                    "username": username}),
                None,
            ),
        };
        let added = self.qmp.execute_raw("object-add", object).await;
        added.map_err(refused)?;
        Ok((id, hostname))
    }

    /// Opens ourselves; `to` gets what there is to serve.
    pub(super) async fn receiver(
        &self,
        to: oneshot::Sender<super::Receiver>,
        teardown: &mut Teardown,
    ) -> Result<Opened> {
        let offer = Offer::make(self.qmp, self.runtime_dir, teardown).await?;
        let opened = Opened::default();
        let gone = |_| Error::new(Kind::Cancelled, "receiving a push");
        let (door, cut) = (offer.door, opened.receiver.clone());
        to.send(super::Receiver { door, cut }).map_err(gone)?;
        let node = step::target_server(self.names, &offer.server, "");
        self.add_server(node, &opened, teardown).await?;
        Ok(opened)
    }
}

async fn connect(server: NbdServer) -> std::io::Result<(Box<dyn Stream>, Option<Hangup>)> {
    Ok(match server {
        NbdServer::Unix(path) => (Box::new(UnixStream::connect(path).await?), None),
        NbdServer::Tcp(address) => {
            let stream = TcpStream::connect(address).await?;
            // What QEMU sends is whole.
            stream.set_nodelay(true)?;
            (Box::new(stream), None)
        }
        NbdServer::Connected(socket) => {
            let (stream, hangup) = socket.open()?;
            (stream, Some(hangup))
        }
    })
}
