//! `qemu-fleece`: the plugin. This file only wires things up.

mod backups;
mod begins;
mod checkpoints;
mod cli;
mod events;
mod exports;
mod guardian;
mod inherited;
mod input;
mod marks;
mod monitors;
mod pushes;
mod requests;
mod restores;
mod serve;
mod stream;
mod wire;
mod writer;

use std::fs::File;
use std::io::{IsTerminal, Write};
use std::process::ExitCode;

use anyhow::Context;
use clap::{CommandFactory, Parser};

use crate::cli::{Cli, Command, Print};
use crate::inherited::Inherited;
use crate::serve::Ending;

/// The command line is unusable.
const EXIT_USAGE: u8 = 2;
/// The host went away before it said `shutdown`, or the process was told to end.
const EXIT_GONE: u8 = 3;
/// A defect of this program.
const EXIT_DEFECT: i32 = 70;

fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(cli) {
        Ok(code) => code,
        Err(error) => {
            let _unwritable = writeln!(std::io::stderr(), "qemu-fleece: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> anyhow::Result<ExitCode> {
    match &cli.command {
        Some(Command::Print(what)) => print(what).map(|()| ExitCode::SUCCESS),
        Some(Command::Guardian) => guard(&cli).map(|()| ExitCode::SUCCESS),
        None if std::io::stdin().is_terminal() => {
            let _unwritable = writeln!(
                std::io::stderr(),
                "qemu-fleece is started by backup software, which speaks JSON lines with it;\n\
                 for a backup by hand see qemu-fleece-host.\n\n{}",
                Cli::command().render_help()
            );
            Ok(ExitCode::from(EXIT_USAGE))
        }
        None => serve(&cli),
    }
}

fn print(what: &Print) -> anyhow::Result<()> {
    let mut bytes = Vec::new();
    match what {
        Print::Schema => {
            serde_json::to_writer_pretty(&mut bytes, &qemu_fleece_protocol::schema::schema())?;
            bytes.push(b'\n');
        }
        Print::Completions { shell } => {
            clap_complete::generate(*shell, &mut Cli::command(), "qemu-fleece", &mut bytes);
        }
        Print::Man => clap_mangen::Man::new(Cli::command()).render(&mut bytes)?,
    }
    std::io::stdout()
        .write_all(&bytes)
        .context("writing standard output")
}

fn serve(cli: &Cli) -> anyhow::Result<ExitCode> {
    let inherited = Inherited::at_start().context("listing the descriptors")?;
    let (stdin, stdout) = take_stdio()?;
    cli.start_log();
    let config = cli.config(inherited)?;
    // One thread: QEMU is the bound, and small requests lose by wandering between two.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let ending = runtime.block_on(serve::serve(config, stdin, stdout))?;
    // The thread that reads standard input may be waiting there for ever.
    runtime.shutdown_background();
    Ok(match ending {
        Ending::Shutdown => ExitCode::SUCCESS,
        Ending::Gone | Ending::Told => ExitCode::from(EXIT_GONE),
    })
}

fn guard(cli: &Cli) -> anyhow::Result<()> {
    let (stdin, stdout) = take_stdio()?;
    cli.start_log();
    guardian::run(stdin, stdout)
}

/// Takes standard input and output for the protocol alone: what any library
/// writes to descriptor 1 from here on goes to standard error.
fn take_stdio() -> anyhow::Result<(File, File)> {
    let stdin = rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdin(), 3)
        .context("taking standard input")?;
    let stdout = rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdout(), 3)
        .context("taking standard output")?;
    rustix::stdio::dup2_stdout(rustix::stdio::stderr())
        .context("pointing descriptor 1 at standard error")?;
    Ok((File::from(stdin), File::from(stdout)))
}
