//! Lets a client that nobody knows into one export of a server, and into no other one.
//!
//! ```text
//! client --option--> judge --of this export--> porter, where it is the last --> server
//!    ^                 |                                                        |
//!    +-- our answer ---+--------------------- its replies ----------------------+
//! ```
//! QEMU has one NBD server with all exports of a session, among them views that can be
//! written. So each option is read before QEMU hears of it, one at a time, and what names
//! another export is refused here. The default export, whose name is empty, is this one.
//! What comes behind the options is [`crate::nbd::courier`]'s.

use std::future::Future;

use tokio::io::{AsyncRead, AsyncWrite};

use crate::error::Result;
use crate::nbd::handshake::{OptionReply, Talk};
use crate::nbd::options::{Options, broken};
use crate::nbd::wire::{MAX_OPTION_REPLIES, option, option_reply, u32_at};

/// Who knows when a client may come into the server.
pub(crate) trait Porter {
    /// Does `step`, with which a client comes in.
    ///
    /// # Errors
    /// Those of `step`; why the client has to go again.
    fn let_in<T: Send>(
        &self,
        step: impl Future<Output = Result<T>> + Send,
    ) -> impl Future<Output = Result<T>> + Send;
}

/// What becomes of an option.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    /// The server is asked, with these data.
    Ask(Vec<u8>),
    /// Transmission begins, in the old way.
    Enter,
    /// It is answered with the export's name.
    List,
    /// It is answered with this type and text.
    Refuse(u32, &'static str),
    /// The client goes.
    Leave,
    /// There is no way to say no.
    HangUp,
}

/// Judges an option of a client of `export`.
fn judge(kind: u32, data: Vec<u8>, export: &str) -> Verdict {
    let is_ours = |name: &[u8]| name.is_empty() || name == export.as_bytes();
    match kind {
        option::EXPORT_NAME if is_ours(&data) => Verdict::Enter,
        option::EXPORT_NAME => Verdict::HangUp,
        option::ABORT => Verdict::Leave,
        option::LIST if data.is_empty() => Verdict::List,
        option::LIST => Verdict::Refuse(option_reply::ERR_INVALID, "LIST has no data"),
        option::STRUCTURED_REPLY => Verdict::Ask(data),
        option::GO | option::INFO | option::SET_META_CONTEXT | option::LIST_META_CONTEXT => {
            match split_name(&data) {
                Some((name, rest)) if is_ours(name) => Verdict::Ask(with_name(export, rest)),
                Some(_) => Verdict::Refuse(option_reply::ERR_UNKNOWN, "there is no such export"),
                None => Verdict::Refuse(option_reply::ERR_INVALID, "it is no name"),
            }
        }
        option::START_TLS => Verdict::Refuse(option_reply::ERR_POLICY, "there is no TLS here"),
        // Extended headers among them: the courier knows structured replies.
        _ => Verdict::Refuse(option_reply::ERR_UNSUP, "the option is not known here"),
    }
}

/// The name that the data start with, and what follows.
fn split_name(data: &[u8]) -> Option<(&[u8], &[u8])> {
    let (_, rest) = data.split_at_checked(4)?;
    rest.split_at_checked(usize::try_from(u32_at(data, 0)).ok()?)
}

/// The data again, with this name.
fn with_name(name: &str, rest: &[u8]) -> Vec<u8> {
    let length = u32::try_from(name.len()).unwrap_or_default();
    [&length.to_be_bytes()[..], name.as_bytes(), rest].concat()
}

/// Greets `client` and follows its options until `porter` has let it into `export` of
/// `server`, a new connection. `None`: the client is gone, or has to go.
///
/// # Errors
/// `NbdProtocol`, `NbdClosed`, of either side; `NbdUnreachable`
/// where the server does not have the export; the porter's.
pub(crate) async fn admit<C, S>(
    client: C,
    server: &mut S,
    export: &str,
    porter: &impl Porter,
) -> Result<Option<C>>
where
    C: AsyncRead + AsyncWrite + Unpin,
    S: AsyncRead + AsyncWrite + Unpin + Send,
{
    let mut talk = Talk::new(server);
    let no_zeroes = talk.greet().await?;
    let mut options = Options::greet(client).await?;
    loop {
        let (kind, data) = options.next().await?;
        match judge(kind, data, export) {
            Verdict::Ask(data) => {
                let asked = ask(&mut talk, kind, &data);
                let replies = if kind == option::GO {
                    porter.let_in(asked).await?
                } else {
                    asked.await?
                };
                for reply in &replies {
                    options.answer(kind, reply.kind, &reply.data).await?;
                }
                let is_done = replies
                    .last()
                    .is_some_and(|it| it.kind == option_reply::ACK);
                if kind == option::GO && is_done {
                    return Ok(Some(options.into_stream()));
                }
            }
            Verdict::Enter => {
                let found = porter.let_in(talk.export_name(export, no_zeroes)).await?;
                let (size, flags) = found.size.unwrap_or_default();
                options.enter(size, flags).await?;
                return Ok(Some(options.into_stream()));
            }
            Verdict::List => {
                let name = with_name(export, &[]);
                options.answer(kind, option_reply::SERVER, &name).await?;
                options.answer(kind, option_reply::ACK, &[]).await?;
            }
            Verdict::Refuse(error, why) => options.answer(kind, error, why.as_bytes()).await?,
            Verdict::Leave => {
                // As a rule it is gone by now.
                let _gone = options.answer(kind, option_reply::ACK, &[]).await;
                return Ok(None);
            }
            Verdict::HangUp => return Ok(None),
        }
    }
}

/// The server's replies to an option: the last one ends it.
async fn ask<S>(talk: &mut Talk<'_, S>, kind: u32, data: &[u8]) -> Result<Vec<OptionReply>>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    talk.option(kind, data).await?;
    let mut replies = Vec::new();
    while replies.len() < MAX_OPTION_REPLIES {
        let reply = talk.option_reply(kind).await?;
        let is_last = reply.kind == option_reply::ACK || reply.is_refusal();
        replies.push(reply);
        if is_last {
            return Ok(replies);
        }
    }
    Err(broken("no end of the server's replies to an option"))
}

#[cfg(test)]
mod tests;
