//! Login and logout.

use regent_types::auth::{LoggedIn, Login};

use crate::call::{Call, Repeat};
use crate::{Client, Error};

impl Client {
    /// Exchanges a password for a token. Use it with [`Client::with_token`].
    pub async fn login(&self, username: &str, password: &str) -> Result<LoggedIn, Error> {
        let body = Login {
            username: username.to_owned(),
            password: password.to_owned(),
        };
        // A second login makes a second token, which harms nobody and expires like the first.
        self.fetch(Call::post(["auth", "login"]).body(&body).repeat(Repeat::Freely))
            .await
    }

    /// Makes the client's own token worthless.
    pub async fn logout(&self) -> Result<(), Error> {
        self.send(Call::post(["auth", "logout"])).await.map(drop)
    }
}
