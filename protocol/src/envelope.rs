//! The JSON-RPC 2.0 envelope: requests from the host, replies and notifications to it.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use crate::error::{Code, WireError};

/// Longest string that may serve as a request's id.
pub const MAX_ID_BYTES: usize = 128;

/// Largest integer that may serve as a request's id: what every JSON library keeps exactly.
pub const MAX_ID: u64 = (1 << 53) - 1;

/// What a request is known by until it is answered: a string of 1 to 128 bytes,
/// or an integer from 0 to 2^53 - 1.
#[derive(
    Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, JsonSchema,
)]
#[serde(untagged)]
pub enum Id {
    /// An integer.
    Number(u64),
    /// A string.
    Text(String),
}

impl Id {
    /// Reads an id without keeping anything else that may stand in its place.
    fn read(text: &str) -> Option<Self> {
        let number = serde_json::from_str(text).map(Self::Number);
        number
            .or_else(|_| serde_json::from_str(text).map(Self::Text))
            .ok()
            .filter(Self::is_sane)
    }

    fn is_sane(&self) -> bool {
        match self {
            Self::Number(number) => *number <= MAX_ID,
            Self::Text(text) => (1..=MAX_ID_BYTES).contains(&text.len()),
        }
    }
}

impl std::fmt::Display for Id {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Number(number) => write!(f, "{number}"),
            Self::Text(text) => write!(f, "{text:?}"),
        }
    }
}

/// A request as it stands on a line, its parameters still unread.
#[derive(Debug)]
pub struct Request {
    /// For the reply.
    pub id: Id,
    /// What is asked.
    pub method: String,
    /// The parameters, as text; `{}` when the line had none.
    pub params: Box<RawValue>,
    /// Raw bytes that follow the line; 0 without the member.
    pub payload_bytes: u64,
}

/// Why a line is no request: what to answer, to whom, and how many payload
/// bytes must be skipped to find the next line.
#[derive(Debug)]
pub struct BadLine {
    /// The id, where the line had a usable one.
    pub id: Option<Id>,
    /// The answer.
    pub error: WireError,
    /// Bytes to skip behind the line.
    pub payload_bytes: u64,
}

/// The members as text: one of a wrong type must not hide the id and the payload,
/// which the reply and the framing need.
#[derive(Deserialize)]
struct Loose {
    jsonrpc: Option<Box<RawValue>>,
    id: Option<Box<RawValue>>,
    method: Option<Box<RawValue>>,
    params: Option<Box<RawValue>>,
    payload_bytes: Option<Box<RawValue>>,
}

/// A member of `T`; `None` where it is absent or something else.
fn read<T: for<'a> Deserialize<'a>>(member: Option<&RawValue>) -> Option<T> {
    member.and_then(|text| serde_json::from_str(text.get()).ok())
}

impl Request {
    /// Reads a line.
    ///
    /// # Errors
    /// `parse_error` for what is not one JSON object in UTF-8, `invalid_request`
    /// for an object that is no JSON-RPC 2.0 request with an id.
    pub fn parse(line: &[u8]) -> Result<Self, Box<BadLine>> {
        let bad = |id: Option<Id>, code: Code, why: String, payload_bytes: u64| {
            Box::new(BadLine {
                id,
                error: WireError::new(code, why),
                payload_bytes,
            })
        };
        let text = std::str::from_utf8(line).map_err(|error| {
            bad(
                None,
                Code::ParseError,
                format!("the line is not UTF-8: {error}"),
                0,
            )
        })?;
        if text.contains('\0') {
            return Err(bad(
                None,
                Code::ParseError,
                "the line has a NUL byte".into(),
                0,
            ));
        }
        if !text.trim_start().starts_with('{') {
            return Err(bad(
                None,
                Code::ParseError,
                "a line holds one object; batches are not part of this protocol".into(),
                0,
            ));
        }
        let loose: Loose = serde_json::from_str(text).map_err(|error| {
            let code = match error.classify() {
                serde_json::error::Category::Data => Code::InvalidRequest,
                _ => Code::ParseError,
            };
            bad(None, code, format!("the line is no request: {error}"), 0)
        })?;
        let payload = read(loose.payload_bytes.as_deref());
        let payload_bytes = payload.unwrap_or(0);
        let id = loose.id.and_then(|id| Id::read(id.get()));
        let Some(id) = id else {
            let why = format!(
                "a request needs an id: a string of 1 to {MAX_ID_BYTES} bytes or an integer from 0 to {MAX_ID}"
            );
            return Err(bad(None, Code::InvalidRequest, why, payload_bytes));
        };
        if payload.is_none() && loose.payload_bytes.is_some() {
            return Err(bad(
                Some(id),
                Code::InvalidRequest,
                "`payload_bytes` must be a number of bytes".into(),
                0,
            ));
        }
        if read::<String>(loose.jsonrpc.as_deref()).as_deref() != Some("2.0") {
            return Err(bad(
                Some(id),
                Code::InvalidRequest,
                "`jsonrpc` must be \"2.0\"".into(),
                payload_bytes,
            ));
        }
        let Some(method) = read(loose.method.as_deref()) else {
            return Err(bad(
                Some(id),
                Code::InvalidRequest,
                "`method` must be a text".into(),
                payload_bytes,
            ));
        };
        let params = match loose.params {
            Some(params) => params,
            None => RawValue::from_string("{}".into()).unwrap_or_default(),
        };
        Ok(Self {
            id,
            method,
            params,
            payload_bytes,
        })
    }

    /// Reads the parameters as `T`.
    ///
    /// # Errors
    /// `invalid_params`, with what is wrong and where.
    pub fn params<T: for<'a> Deserialize<'a>>(&self) -> Result<T, WireError> {
        // serde reads a struct from an array too; names are what can grow.
        if !self.params.get().starts_with('{') {
            let why = format!("parameters of {} are not in an object", self.method);
            return Err(WireError::new(Code::InvalidParams, why));
        }
        serde_json::from_str(self.params.get()).map_err(|error| {
            WireError::new(
                Code::InvalidParams,
                format!("parameters of {}: {error}", self.method),
            )
        })
    }
}

#[derive(Serialize)]
struct ResultReply<'a, T> {
    jsonrpc: &'static str,
    id: &'a Id,
    result: T,
}

#[derive(Serialize)]
struct ErrorReply<'a> {
    jsonrpc: &'static str,
    id: Option<&'a Id>,
    error: &'a WireError,
}

/// The line of a successful reply, with its `\n`.
///
/// # Errors
/// When `result` cannot be put into JSON.
pub fn result_line<T: Serialize>(id: &Id, result: T) -> serde_json::Result<Vec<u8>> {
    line(&ResultReply {
        jsonrpc: "2.0",
        id,
        result,
    })
}

/// The line of an error reply, with its `\n`; `id` is null where the request had none.
///
/// # Errors
/// When `error` cannot be put into JSON.
pub fn error_line(id: Option<&Id>, error: &WireError) -> serde_json::Result<Vec<u8>> {
    line(&ErrorReply {
        jsonrpc: "2.0",
        id,
        error,
    })
}

#[derive(Serialize)]
struct Notification<'a, T> {
    jsonrpc: &'static str,
    method: &'a str,
    params: T,
    #[serde(skip_serializing_if = "Option::is_none")]
    payload_bytes: Option<u64>,
}

/// The line of a notification, with its `\n`; `payload_bytes` raw bytes must
/// follow it on the wire.
///
/// # Errors
/// When `params` cannot be put into JSON.
pub fn notification_line<T: Serialize>(
    method: &str,
    params: T,
    payload_bytes: Option<u64>,
) -> serde_json::Result<Vec<u8>> {
    line(&Notification {
        jsonrpc: "2.0",
        method,
        params,
        payload_bytes,
    })
}

fn line<T: Serialize>(value: &T) -> serde_json::Result<Vec<u8>> {
    let mut bytes = serde_json::to_vec(value)?;
    bytes.push(b'\n');
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn code_of(line: &[u8]) -> (Code, Option<Id>) {
        let bad = Request::parse(line).unwrap_err();
        (bad.error.data.code, bad.id)
    }

    #[test]
    fn what_is_no_request_is_told_apart() {
        let seven = Some(Id::Number(7));
        for (line, expected) in [
            (&b""[..], (Code::ParseError, None)),
            (b"{\"id\":7", (Code::ParseError, None)),
            (b"{} {}", (Code::ParseError, None)),
            (b"\xff\xfe", (Code::ParseError, None)),
            (b"{\"a\":\"\0\"}", (Code::ParseError, None)),
            (b"[]", (Code::ParseError, None)),
            (b" [{\"id\":7}]", (Code::ParseError, None)),
            (b"7", (Code::ParseError, None)),
            (b"null", (Code::ParseError, None)),
            (b"{}", (Code::InvalidRequest, None)),
            (
                b"{\"jsonrpc\":\"2.0\",\"method\":\"ping\"}",
                (Code::InvalidRequest, None),
            ),
            (
                b"{\"jsonrpc\":\"2.0\",\"method\":\"ping\",\"id\":1.5}",
                (Code::InvalidRequest, None),
            ),
            (
                b"{\"jsonrpc\":\"2.0\",\"method\":\"ping\",\"id\":9007199254740992}",
                (Code::InvalidRequest, None),
            ),
            (
                b"{\"method\":\"ping\",\"id\":7}",
                (Code::InvalidRequest, seven.clone()),
            ),
            (
                b"{\"jsonrpc\":\"2.0\",\"id\":7}",
                (Code::InvalidRequest, seven.clone()),
            ),
            (
                b"{\"jsonrpc\":2.0,\"method\":\"ping\",\"id\":7}",
                (Code::InvalidRequest, seven.clone()),
            ),
            (
                b"{\"jsonrpc\":\"2.0\",\"method\":{},\"id\":7}",
                (Code::InvalidRequest, seven.clone()),
            ),
            (
                b"{\"jsonrpc\":\"2.0\",\"method\":\"ping\",\"id\":7,\"payload_bytes\":-1}",
                (Code::InvalidRequest, seven),
            ),
        ] {
            assert_eq!(code_of(line), expected, "{}", String::from_utf8_lossy(line));
        }
        let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
        let line = format!("{{\"jsonrpc\":\"2.0\",\"id\":{deep},\"method\":\"ping\"}}");
        assert_eq!(code_of(line.as_bytes()), (Code::InvalidRequest, None));
        let line = format!(
            "{{\"jsonrpc\":\"2.0\",\"id\":7,\"method\":\"ping\",\"params\":{{\"a\":{deep}}}}}"
        );
        let request = Request::parse(line.as_bytes()).unwrap();
        assert_eq!(
            request.params::<serde_json::Value>().unwrap_err().data.code,
            Code::InvalidParams
        );
    }

    #[test]
    fn a_bad_request_still_tells_its_payload() {
        for line in [
            r#"{"jsonrpc":"1.0","id":1,"payload_bytes":12}"#,
            r#"{"jsonrpc":{},"id":1,"payload_bytes":12}"#,
            r#"{"jsonrpc":"2.0","id":[],"payload_bytes":12}"#,
            r#"{"jsonrpc":"2.0","id":1,"method":2,"payload_bytes":12}"#,
        ] {
            let bad = Request::parse(line.as_bytes()).unwrap_err();
            assert_eq!(bad.payload_bytes, 12, "{line}");
        }
    }
}
