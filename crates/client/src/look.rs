//! What one node says at a path, whatever it is: for people who look for a fault.

use std::time::Duration;

use crate::{Client, Error};

/// How long a node may take to say it.
const WITHIN: Duration = Duration::from_secs(6);

impl Client {
    /// Asks the first server once, and gives status and text, also of a refusal.
    ///
    /// # Errors
    /// When it does not answer.
    pub async fn look(&self, path: &str) -> Result<(u16, String), Error> {
        let server = self.first_server();
        let url = server
            .join(path)
            .map_err(|error| Error::Configuration(format!("{path:?} cannot stand in a URL: {error}")))?;
        let unreachable = |source| Error::Unreachable {
            servers: vec![server.to_string()],
            maybe_done: false,
            source,
        };
        let answer = self.get(url).timeout(WITHIN).send().await.map_err(unreachable)?;
        let status = answer.status().as_u16();
        Ok((status, answer.text().await.map_err(unreachable)?))
    }
}
