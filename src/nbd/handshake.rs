//! "Fixed newstyle negotiation": from the greeting to transmission.
//!
//! ```text
//! greeting, flags
//!   EXTENDED_HEADERS --no--> STRUCTURED_REPLY --no--> simple replies
//!   SET_META_CONTEXT (one), where one is wanted: it must be given
//!   GO --unsupported--> EXPORT_NAME
//! ```

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use crate::error::{Error, Kind, Result};
use crate::nbd::wire::{
    DEFAULT_MAX_PAYLOAD, FLAG_FIXED_NEWSTYLE, FLAG_NO_ZEROES, IHAVEOPT, MAX_OPTION_REPLIES,
    MAX_OPTION_REPLY, MAX_STRING, NBDMAGIC, OPTION_REPLY_MAGIC, Replies, flag, info, option,
    option_reply, u16_at, u32_at, u64_at,
};

/// What the server says of the export.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Export {
    /// Bytes.
    pub size: u64,
    /// Transmission flags, of [`crate::nbd::wire::flag`].
    pub flags: u16,
    /// Offsets and lengths are multiples of it; 1 where the server says nothing.
    pub min_block: u32,
    /// What the server likes best, as far as a payload may have.
    pub preferred_block: u32,
    /// Longest payload of a request or reply.
    pub max_payload: u32,
    /// How replies look.
    pub replies: Replies,
    /// The id of the meta context that was asked for.
    pub context: Option<u32>,
}

impl Export {
    /// Whether a flag of [`crate::nbd::wire::flag`] is set.
    #[must_use]
    pub fn has(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }
}

fn broken(what: impl Into<String>) -> Error {
    Error::new(Kind::NbdProtocol, "negotiating with the NBD server").because(what.into())
}

/// Negotiates the export `name`, with the meta context `context` if one is named.
///
/// # Errors
/// [`Kind::NbdUnreachable`] where the server does not have the export or the
/// context; [`Kind::NbdProtocol`] for a lie; [`Kind::NbdClosed`].
pub async fn negotiate<S>(stream: &mut S, name: &str, context: Option<&str>) -> Result<Export>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    check_name(name)?;
    check_name(context.unwrap_or_default())?;
    let mut talk = Talk::new(stream);
    let no_zeroes = talk.greet().await?;
    let replies = talk.replies().await?;
    let context = match context {
        Some(context) => Some(talk.context(name, context, replies).await?),
        None => None,
    };
    let found = talk.enter(name, no_zeroes).await?;
    found.check(replies, context)
}

/// [`negotiate`] of simple replies, which every server has, and no context.
///
/// # Errors
/// As there.
pub async fn negotiate_simple<S>(stream: &mut S, name: &str) -> Result<Export>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    check_name(name)?;
    let mut talk = Talk::new(stream);
    let no_zeroes = talk.greet().await?;
    let found = talk.enter(name, no_zeroes).await?;
    found.check(Replies::Simple, None)
}

/// Agrees with the server that TLS is next.
///
/// # Errors
/// [`Kind::NbdUnreachable`] where it refuses; else as of [`negotiate`].
pub async fn start_tls<S>(stream: &mut S) -> Result<()>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut talk = Talk::new(stream);
    talk.greet().await?;
    talk.option(option::START_TLS, &[]).await?;
    let reply = talk.option_reply(option::START_TLS).await?;
    match reply.kind {
        option_reply::ACK => Ok(()),
        _ if reply.is_refusal() => Err(reply.refusal("TLS")),
        kind => Err(broken(format!("a reply of type {kind} to STARTTLS"))),
    }
}

fn check_name(name: &str) -> Result<()> {
    if name.len() > MAX_STRING {
        return Err(
            Error::new(Kind::InvalidRequest, "negotiating with the NBD server")
                .because(format!("a name is longer than {MAX_STRING} bytes")),
        );
    }
    Ok(())
}

/// What GO or EXPORT_NAME tells.
#[derive(Default)]
pub(super) struct Found {
    /// Bytes, and transmission flags.
    pub(super) size: Option<(u64, u16)>,
    blocks: Option<(u32, u32, u32)>,
}

impl Found {
    fn check(self, replies: Replies, context: Option<u32>) -> Result<Export> {
        let (size, flags) = self
            .size
            .ok_or_else(|| broken("no size before the end of GO"))?;
        if i64::try_from(size).is_err() {
            return Err(broken(format!(
                "the export's size is {size}, which no offset can reach"
            )));
        }
        if flags & flag::HAS_FLAGS == 0 {
            return Err(broken("the transmission flags do not have HAS_FLAGS"));
        }
        let (min, preferred, max) = self.blocks.unwrap_or((1, 4096, DEFAULT_MAX_PAYLOAD));
        let power = min.is_power_of_two() && preferred.is_power_of_two();
        if !power
            || min > 64 * 1024
            || preferred < min
            || (max != u32::MAX
                && (u64::from(max) < size.min(preferred.into()) || !max.is_multiple_of(min)))
        {
            return Err(broken(format!(
                "block sizes that cannot be: {min}, {preferred}, {max}"
            )));
        }
        Ok(Export {
            size,
            flags,
            min_block: min,
            // One of it has to fit: whoever gets this from us checks that, too.
            preferred_block: preferred.min(DEFAULT_MAX_PAYLOAD),
            max_payload: max.min(DEFAULT_MAX_PAYLOAD),
            replies,
            context,
        })
    }
}

/// A reply to an option.
pub(super) struct OptionReply {
    /// Of [`option_reply`].
    pub(super) kind: u32,
    pub(super) data: Vec<u8>,
}

impl OptionReply {
    pub(super) fn is_refusal(&self) -> bool {
        self.kind & option_reply::ERROR_BIT != 0
    }

    fn refusal(&self, what: &str) -> Error {
        let why = String::from_utf8_lossy(&self.data).into_owned();
        let number = self.kind & !option_reply::ERROR_BIT;
        Error::new(
            Kind::NbdUnreachable,
            format!("asking the NBD server for {what}"),
        )
        .because(format!("it refuses with error {number}: {why:?}"))
    }
}

/// "Option haggling", the client's side.
pub(super) struct Talk<'a, S> {
    stream: &'a mut S,
}

impl<'a, S: AsyncRead + AsyncWrite + Unpin> Talk<'a, S> {
    pub(super) fn new(stream: &'a mut S) -> Self {
        Self { stream }
    }

    async fn read<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        self.stream.read_exact(&mut bytes).await.map_err(closed)?;
        Ok(bytes)
    }

    async fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.stream.write_all(bytes).await.map_err(closed)?;
        self.stream.flush().await.map_err(closed)
    }

    /// Whether NBD_OPT_EXPORT_NAME will come without zeros behind it.
    pub(super) async fn greet(&mut self) -> Result<bool> {
        let greeting: [u8; 18] = self.read().await?;
        if u64_at(&greeting, 0) != NBDMAGIC || u64_at(&greeting, 8) != IHAVEOPT {
            return Err(broken(
                "the greeting has a wrong magic: no newstyle NBD server",
            ));
        }
        let flags = u16_at(&greeting, 16);
        if flags & FLAG_FIXED_NEWSTYLE == 0 {
            return Err(broken("the server does not speak fixed newstyle"));
        }
        let no_zeroes = flags & FLAG_NO_ZEROES;
        self.write(&u32::from(FLAG_FIXED_NEWSTYLE | no_zeroes).to_be_bytes())
            .await?;
        Ok(no_zeroes != 0)
    }

    pub(super) async fn option(&mut self, option: u32, data: &[u8]) -> Result<()> {
        let length = u32::try_from(data.len()).map_err(|error| broken(error.to_string()))?;
        let mut bytes = IHAVEOPT.to_be_bytes().to_vec();
        bytes.extend(option.to_be_bytes());
        bytes.extend(length.to_be_bytes());
        bytes.extend(data);
        self.write(&bytes).await
    }

    pub(super) async fn option_reply(&mut self, option: u32) -> Result<OptionReply> {
        let header: [u8; 20] = self.read().await?;
        if u64_at(&header, 0) != OPTION_REPLY_MAGIC {
            return Err(broken("a reply to an option has a wrong magic"));
        }
        if u32_at(&header, 8) != option {
            return Err(broken(format!(
                "a reply to option {} where {option} was sent",
                u32_at(&header, 8)
            )));
        }
        let (kind, length) = (u32_at(&header, 12), u32_at(&header, 16));
        if length > MAX_OPTION_REPLY {
            return Err(broken(format!(
                "a reply to an option is {length} bytes long"
            )));
        }
        let mut data = vec![0; usize::try_from(length).unwrap_or_default()];
        self.stream.read_exact(&mut data).await.map_err(closed)?;
        Ok(OptionReply { kind, data })
    }

    async fn replies(&mut self) -> Result<Replies> {
        for (wanted, replies) in [
            (option::EXTENDED_HEADERS, Replies::Extended),
            (option::STRUCTURED_REPLY, Replies::Structured),
        ] {
            self.option(wanted, &[]).await?;
            let reply = self.option_reply(wanted).await?;
            if reply.kind == option_reply::ACK {
                return Ok(replies);
            }
            if !reply.is_refusal() {
                return Err(broken(format!(
                    "a reply of type {} to option {wanted}",
                    reply.kind
                )));
            }
        }
        Ok(Replies::Simple)
    }

    async fn context(&mut self, name: &str, context: &str, replies: Replies) -> Result<u32> {
        let missing = || {
            Error::new(
                Kind::NbdUnreachable,
                "asking the NBD server for a meta context",
            )
            .because(format!("it has no {context}"))
        };
        if replies == Replies::Simple {
            return Err(missing());
        }
        let mut data = Vec::new();
        put_string(&mut data, name)?;
        data.extend(1u32.to_be_bytes());
        put_string(&mut data, context)?;
        self.option(option::SET_META_CONTEXT, &data).await?;
        let mut id = None;
        for _ in 0..MAX_OPTION_REPLIES {
            let reply = self.option_reply(option::SET_META_CONTEXT).await?;
            match reply.kind {
                option_reply::ACK => return id.ok_or_else(missing),
                option_reply::META_CONTEXT if reply.data.len() >= 4 => {
                    let found = String::from_utf8_lossy(&reply.data[4..]).into_owned();
                    if found != context || id.is_some() {
                        return Err(broken(format!(
                            "the context {found:?}, which was not asked for"
                        )));
                    }
                    id = Some(u32_at(&reply.data, 0));
                }
                _ if reply.is_refusal() => {
                    return Err(reply.refusal(&format!("meta context {context:?}")));
                }
                kind => {
                    return Err(broken(format!(
                        "a reply of type {kind} to SET_META_CONTEXT"
                    )));
                }
            }
        }
        Err(broken("no end of replies to SET_META_CONTEXT"))
    }

    async fn enter(&mut self, name: &str, no_zeroes: bool) -> Result<Found> {
        match self.go(name).await? {
            Some(found) => Ok(found),
            None => self.export_name(name, no_zeroes).await,
        }
    }

    /// `None` when the server does not know GO.
    async fn go(&mut self, name: &str) -> Result<Option<Found>> {
        let mut data = Vec::new();
        put_string(&mut data, name)?;
        data.extend(1u16.to_be_bytes());
        data.extend(info::BLOCK_SIZE.to_be_bytes());
        self.option(option::GO, &data).await?;
        let mut found = Found::default();
        for _ in 0..MAX_OPTION_REPLIES {
            let reply = self.option_reply(option::GO).await?;
            match reply.kind {
                option_reply::ACK => return Ok(Some(found)),
                option_reply::ERR_UNSUP => return Ok(None),
                option_reply::INFO if reply.data.len() >= 2 => {
                    let data = &reply.data;
                    match (u16_at(data, 0), data.len()) {
                        (info::EXPORT, 12) => {
                            found.size = Some((u64_at(data, 2), u16_at(data, 10)))
                        }
                        (info::BLOCK_SIZE, 14) => {
                            found.blocks =
                                Some((u32_at(data, 2), u32_at(data, 6), u32_at(data, 10)));
                        }
                        (kind @ (info::EXPORT | info::BLOCK_SIZE), length) => {
                            return Err(broken(format!("information {kind} with {length} bytes")));
                        }
                        _ => {}
                    }
                }
                _ if reply.is_refusal() => return Err(reply.refusal(&format!("export {name:?}"))),
                kind => return Err(broken(format!("a reply of type {kind} to GO"))),
            }
        }
        Err(broken("no end of replies to GO"))
    }

    pub(super) async fn export_name(&mut self, name: &str, no_zeroes: bool) -> Result<Found> {
        self.option(option::EXPORT_NAME, name.as_bytes()).await?;
        let answer = self
            .read::<10>()
            .await
            .map_err(|error| match error.kind() {
                // The only way in which a server can say no here.
                Kind::NbdClosed => Error::new(
                    Kind::NbdUnreachable,
                    format!("asking the NBD server for export {name:?}"),
                )
                .because(error),
                _ => error,
            })?;
        if !no_zeroes {
            let _zeros: [u8; 124] = self.read().await?;
        }
        Ok(Found {
            size: Some((u64_at(&answer, 0), u16_at(&answer, 8))),
            blocks: None,
        })
    }
}

fn put_string(data: &mut Vec<u8>, text: &str) -> Result<()> {
    let length = u32::try_from(text.len()).map_err(|error| broken(error.to_string()))?;
    data.extend(length.to_be_bytes());
    data.extend(text.as_bytes());
    Ok(())
}

fn closed(error: std::io::Error) -> Error {
    Error::new(Kind::NbdClosed, "negotiating with the NBD server").because(error)
}

#[cfg(test)]
mod tests;
