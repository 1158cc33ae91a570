//! The command line.

use std::ffi::OsString;
use std::io::IsTerminal;
use std::path::PathBuf;

use clap::{Parser, Subcommand, ValueEnum};
use qemu_fleece_engine::guardian::Program;

use crate::inherited::Inherited;
use crate::serve::Config;

/// Consistent, incremental backups of QEMU virtual machines, for backup software.
///
/// Without a command it speaks the qemu-fleece protocol, version 1, on standard
/// input and output; logs go to standard error.
#[derive(Debug, Parser)]
#[command(version, about)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Option<Command>,

    /// Where scratch files lie that a host names no other place for
    #[arg(
        long,
        value_name = "DIR",
        default_value = "/var/tmp",
        env = "QEMU_FLEECE_SCRATCH_DIR"
    )]
    scratch_dir: PathBuf,

    /// Where private directories for sockets are made [default: $XDG_RUNTIME_DIR, else /tmp]
    #[arg(long, value_name = "DIR", env = "QEMU_FLEECE_RUNTIME_DIR")]
    runtime_dir: Option<PathBuf>,

    /// The qemu-storage-daemon that writes restored images
    #[arg(
        long,
        value_name = "PROGRAM",
        default_value = "qemu-storage-daemon",
        env = "QEMU_FLEECE_STORAGE_DAEMON"
    )]
    storage_daemon: PathBuf,

    /// Least severity of log messages, or a filter in the form of RUST_LOG
    #[arg(
        long,
        value_name = "FILTER",
        default_value = "warn",
        env = "QEMU_FLEECE_LOG", value_parser = filter
    )]
    log: String,

    /// Form of log messages
    #[arg(long, value_name = "FORMAT", default_value = "text")]
    log_format: LogFormat,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum LogFormat {
    /// For people
    Text,
    /// One JSON object a line
    Json,
}

/// What it does instead of serving a host.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    #[command(flatten)]
    Print(Print),
    /// Let a guest go that is held for a backup; started by qemu-fleece itself
    #[command(hide = true)]
    Guardian,
}

/// What it prints.
#[derive(Debug, Subcommand)]
pub(crate) enum Print {
    /// Print the JSON Schema of all messages
    Schema,
    /// Print completions for a shell
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Print the manual page
    Man,
}

impl Cli {
    /// Starts logging to standard error.
    pub(crate) fn start_log(&self) {
        let filter = tracing_subscriber::EnvFilter::new(&self.log);
        let log = tracing_subscriber::fmt()
            .with_env_filter(filter)
            .with_ansi(std::io::stderr().is_terminal())
            .with_writer(std::io::stderr);
        match self.log_format {
            LogFormat::Text => log.init(),
            LogFormat::Json => log.json().init(),
        }
    }

    /// How this very program is started as a guardian.
    fn guardian(&self) -> Program {
        let name = std::env::args_os().next();
        let format = match self.log_format {
            LogFormat::Text => "text",
            LogFormat::Json => "json",
        };
        Program {
            // Not its name: the file may have been replaced meanwhile.
            path: PathBuf::from("/proc/self/exe"),
            name: name.unwrap_or_else(|| "qemu-fleece".into()),
            arguments: ["--log", &self.log, "--log-format", format, "guardian"]
                .map(OsString::from)
                .to_vec(),
        }
    }

    /// What the server needs to know.
    pub(crate) fn config(&self, inherited: Inherited) -> anyhow::Result<Config> {
        let runtime_dir = self
            .runtime_dir
            .clone()
            .or_else(|| {
                std::env::var_os("XDG_RUNTIME_DIR")
                    .map(PathBuf::from)
                    .filter(|dir| dir.is_dir())
            })
            .unwrap_or_else(|| PathBuf::from("/tmp"));
        Ok(Config {
            scratch_dir: self.scratch_dir.clone(),
            runtime_dir,
            storage_daemon: self.storage_daemon.clone(),
            guardian: self.guardian(),
            inherited,
        })
    }
}

/// Refuses a filter that would be ignored in part.
fn filter(text: &str) -> Result<String, String> {
    match tracing_subscriber::EnvFilter::try_new(text) {
        Ok(_) => Ok(text.to_owned()),
        Err(error) => Err(error.to_string()),
    }
}
