//! API tokens.

use regent_types::auth::{ApiToken, CreateToken, TokenList};
use regent_types::{AgentId, TokenId};

use crate::call::Call;
use crate::page::{Page, fetch_all};
use crate::{Client, Error};

impl Client {
    /// Makes a token. Its secret is in this answer only, and absent when an earlier attempt of this call
    /// was done without its answer arriving: then revoke it and make another.
    pub async fn create_token(&self, token: &CreateToken) -> Result<ApiToken, Error> {
        self.fetch(Call::post(["tokens"]).body(token)).await
    }

    /// Makes a token for an agent. As for [`Client::create_token`], the secret is shown once.
    pub async fn create_agent_token(&self, agent: &AgentId) -> Result<ApiToken, Error> {
        self.fetch(Call::post(["agents", agent.as_str(), "token"])).await
    }

    /// One page of the tokens that the caller may see.
    pub async fn tokens(&self, page: &Page) -> Result<TokenList, Error> {
        self.fetch(Call::get(["tokens"]).query(page.query())).await
    }

    /// All tokens that the caller may see.
    pub async fn all_tokens(&self) -> Result<Vec<ApiToken>, Error> {
        fetch_all(|page| async move {
            let list = self.tokens(&page).await?;
            Ok((list.tokens, list.next_cursor))
        })
        .await
    }

    /// Makes a token worthless.
    pub async fn delete_token(&self, id: &TokenId) -> Result<(), Error> {
        self.send(Call::delete(["tokens", id.as_str()])).await.map(drop)
    }
}
