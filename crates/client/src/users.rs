//! Users.

use regent_types::UserName;
use regent_types::auth::{CreateUser, Quota, SetPassword, User, UserList};

use crate::call::Call;
use crate::page::{Page, fetch_all};
use crate::{Client, Error};

impl Client {
    /// Makes a user.
    pub async fn create_user(&self, user: &CreateUser) -> Result<User, Error> {
        self.fetch(Call::post(["users"]).body(user)).await
    }

    /// One page of the users.
    pub async fn users(&self, page: &Page) -> Result<UserList, Error> {
        self.fetch(Call::get(["users"]).query(page.query())).await
    }

    /// All users.
    pub async fn all_users(&self) -> Result<Vec<User>, Error> {
        fetch_all(|page| async move {
            let list = self.users(&page).await?;
            Ok((list.users, list.next_cursor))
        })
        .await
    }

    /// Removes a user.
    pub async fn delete_user(&self, name: &UserName) -> Result<(), Error> {
        self.send(Call::delete(["users", name.as_str()])).await.map(drop)
    }

    /// Sets a user's password.
    pub async fn set_password(&self, name: &UserName, password: &SetPassword) -> Result<(), Error> {
        self.send(Call::put(["users", name.as_str(), "password"]).body(password))
            .await
            .map(drop)
    }

    /// Sets what a user's sessions may use together.
    pub async fn set_quota(&self, name: &UserName, quota: &Quota) -> Result<(), Error> {
        self.send(Call::put(["users", name.as_str(), "quota"]).body(quota))
            .await
            .map(drop)
    }
}
