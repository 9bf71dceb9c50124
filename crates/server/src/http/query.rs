//! Parameters of paths and queries. Unknown names and values are refused, by name: a filter that was
//! misspelled and ignored would show everything, which is worse than an error.

use axum::extract::{FromRequestParts, RawPathParams};
use axum::http::request::Parts;
use regent_types::Revision;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use utoipa::{IntoParams, ToSchema};

use super::problem::{Failure, Result};

/// The query of a request, parsed and checked.
pub(super) struct Query<T>(pub(super) T);

impl<T: DeserializeOwned, S: Sync> FromRequestParts<S> for Query<T> {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self> {
        parse(parts.uri.query().unwrap_or_default()).map(Self)
    }
}

pub(super) fn parse<T: DeserializeOwned>(query: &str) -> Result<T> {
    let pairs = serde_urlencoded::Deserializer::new(form_urlencoded::parse(query.as_bytes()));
    serde_path_to_error::deserialize(pairs).map_err(|error| {
        let (path, message) = (error.path().to_string(), error.inner().to_string());
        // An unknown or a repeated name is noticed above any field; the message names it.
        Failure::field(if path == "." { "query".to_owned() } else { path }, message)
    })
}

/// How fresh a read must be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub(super) enum Consistency {
    /// Everything that was acknowledged before the request is seen.
    #[default]
    Linearizable,
    /// What this node has applied; answered without a quorum too.
    Stale,
}

/// What every read takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct Read {
    /// `linearizable` (default) or `stale`.
    #[serde(default)]
    #[param(inline)]
    pub(super) consistency: Consistency,
    /// See at least this revision: an `X-Regent-Index` of an earlier answer.
    pub(super) min_index: Option<Revision>,
}

/// A query that takes nothing.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct NoQuery {}

/// One parameter of the path, checked.
///
/// axum's own extractor is not used: what it refuses it answers in plain text.
pub(super) struct Name<T>(pub(super) T);

impl<T, S> FromRequestParts<S> for Name<T>
where
    T: std::str::FromStr,
    T::Err: std::fmt::Display,
    S: Send + Sync,
{
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self> {
        let params = RawPathParams::from_request_parts(parts, state)
            .await
            .map_err(|error| Failure::field("path", error.body_text()))?;
        let (name, text) = params
            .iter()
            .next()
            .expect("routes with a `Name` have one parameter");
        text.parse()
            .map(Self)
            .map_err(|error: T::Err| Failure::field(name, error.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn field_of<T: std::fmt::Debug>(result: Result<T>) -> String {
        format!("{:?}", result.unwrap_err())
    }

    #[test]
    fn known_parameters_are_read() {
        let read: Read = parse("consistency=stale&min_index=7").unwrap();
        assert_eq!(
            read,
            Read {
                consistency: Consistency::Stale,
                min_index: Some(Revision(7))
            }
        );
        assert_eq!(parse::<Read>("").unwrap(), Read::default());
    }

    #[test]
    fn unknown_names_and_values_are_refused_by_name() {
        assert!(field_of(parse::<Read>("consistancy=stale")).contains("consistancy"));
        assert!(field_of(parse::<Read>("consistency=fresh")).contains("fresh"));
        assert!(field_of(parse::<Read>("min_index=-1")).contains("min_index"));
        assert!(field_of(parse::<Read>("min_index=1&min_index=2")).contains("duplicate"));
    }
}
