//! The monitors in use. QEMU serves one client a monitor, so the requests of
//! this process share one connection; it closes with its last user.

use std::collections::HashMap;
use std::sync::{Arc, Weak};
use std::time::Duration;

use qemu_fleece_engine::Result;
use qemu_fleece_engine::qemu::{Address, Qmp};
use qemu_fleece_engine::server::Server;
use tokio::sync::Mutex;

/// How long a monitor gets to greet.
const GREETING_DEADLINE: Duration = Duration::from_secs(5);

/// A shared connection.
#[derive(Debug)]
pub(crate) struct Monitor {
    pub(crate) qmp: Qmp,
    /// Its QEMU's NBD server, as far as it is ours.
    pub(crate) server: Server,
}

/// All of them, by address.
#[derive(Clone, Debug, Default)]
pub(crate) struct Monitors {
    known: Arc<Mutex<HashMap<Address, Weak<Monitor>>>>,
}

impl Monitors {
    /// The connection to `address`: one that is open, or a new one.
    pub(crate) async fn get(&self, address: &str) -> Result<Arc<Monitor>> {
        let address = Address::parse(address)?;
        // Held while connecting: a second connection at the same time would find
        // the monitor busy with the first.
        let mut known = self.known.lock().await;
        known.retain(|_, monitor| monitor.strong_count() > 0);
        if let Some(monitor) = known.get(&address).and_then(Weak::upgrade)
            && !monitor.qmp.is_closed()
        {
            return Ok(monitor);
        }
        let monitor = Arc::new(Monitor {
            qmp: Qmp::connect(&address, GREETING_DEADLINE).await?,
            server: Server::default(),
        });
        known.insert(address, Arc::downgrade(&monitor));
        Ok(monitor)
    }
}
