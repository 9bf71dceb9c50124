//! Keeps secrets out of a bundle, in two ways: by the name of a field, and by the secrets themselves wherever
//! they stand, such as in a log.

use std::path::Path;

use serde_json::Value;

/// What stands in the place of a secret.
const MASKED: &str = "(masked)";
/// What stands in the place of what users gave to be passed on; it may hold anything.
const LEFT_OUT: &str = "(left out)";
/// Fields of the second kind.
const FREE: [&str; 5] = ["payload", "result", "metadata", "env", "url"];
/// Shorter ones are no secrets, and masking them would spoil the rest.
const SHORTEST: usize = 8;
/// How every API token begins.
const TOKEN_PREFIX: &str = "regent_";
/// Characters of a token after that; names of metrics begin the same, but have no capitals.
const TOKEN_CHARS: usize = 43;

/// The secrets that are known here.
pub(super) struct Masks(Vec<String>);

impl Masks {
    /// Those in a configuration, and in the files that it names.
    pub(super) fn of(configuration: &Value) -> Self {
        let mut secrets = Vec::new();
        gather(configuration, &mut secrets);
        secrets.retain(|secret| secret.len() >= SHORTEST);
        // One that holds another goes first.
        secrets.sort_by_key(|secret| std::cmp::Reverse(secret.len()));
        Self(secrets)
    }

    /// Masks the fields of a document.
    pub(super) fn fields(value: &mut Value) {
        match value {
            Value::Object(fields) => {
                for (name, value) in fields {
                    if FREE.contains(&name.as_str()) && !value.is_null() {
                        *value = Value::from(LEFT_OUT);
                    } else if is_secret(name) && value.is_string() {
                        *value = Value::from(MASKED);
                    } else {
                        Self::fields(value);
                    }
                }
            }
            Value::Array(values) => values.iter_mut().for_each(Self::fields),
            Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
        }
    }

    /// Masks secrets wherever they stand.
    pub(super) fn text(&self, text: &str) -> String {
        let mut text = text.to_owned();
        for secret in &self.0 {
            text = text.replace(secret.as_str(), MASKED);
        }
        without_tokens(&text)
    }
}

/// Whether a field holds a secret by its name; one that names a file does not.
fn is_secret(name: &str) -> bool {
    let name = name.to_ascii_lowercase();
    !name.ends_with("file")
        && ["token", "password", "secret"]
            .iter()
            .any(|word| name.contains(word))
}

fn gather(value: &Value, secrets: &mut Vec<String>) {
    match value {
        Value::Object(fields) => {
            for (name, value) in fields {
                match value {
                    Value::String(text) if is_secret(name) => secrets.push(text.clone()),
                    Value::String(file) if name.ends_with("-file") => {
                        secrets.extend(
                            std::fs::read_to_string(Path::new(file)).map(|text| text.trim().to_owned()),
                        );
                    }
                    _ => gather(value, secrets),
                }
            }
        }
        Value::Array(values) => values.iter().for_each(|value| gather(value, secrets)),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

/// Masks every word that is an API token by its shape.
fn without_tokens(text: &str) -> String {
    let of_token = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
    let mut masked = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find(TOKEN_PREFIX) {
        let (before, found) = rest.split_at(at);
        masked.push_str(before);
        let length = found.find(|c| !of_token(c)).unwrap_or(found.len());
        let (word, after) = found.split_at(length);
        let secret =
            word.len() >= TOKEN_PREFIX.len() + TOKEN_CHARS && word.contains(|c: char| c.is_ascii_uppercase());
        masked.push_str(if secret { MASKED } else { word });
        rest = after;
    }
    masked + rest
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn secrets_are_masked_by_field_by_value_and_by_shape() {
        let masks = Masks::of(&json!({ "file": { "token": "a-chosen-token", "node-id": 1 } }));
        let mut value = json!({
            "token": 17, "apiToken": "abc", "token-file": "/etc/token", "payload": { "x": 1 }, "result": null,
            "inner": [{ "password": "p" }],
        });
        Masks::fields(&mut value);
        let expected = json!({
            "token": 17, "apiToken": MASKED, "token-file": "/etc/token", "payload": LEFT_OUT, "result": null,
            "inner": [{ "password": MASKED }],
        });
        assert_eq!(value, expected);
        let token = format!("regent_{}", "aB3_-".repeat(9));
        assert_eq!(
            masks.text(&format!(
                "x=a-chosen-token {token}, regent_agent_connections_superseded_total_and_more_of_it 1"
            )),
            "x=(masked) (masked), regent_agent_connections_superseded_total_and_more_of_it 1"
        );
    }
}
