//! How many connections each address has, so that one cannot have them all. For both ports of a node.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv6Addr};
use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex, PoisonError};

/// The part of an IPv6 address that says whose it is: the rest is its owner's to choose, and no two need be alike.
const IPV6_NETWORK: u128 = !0 << 64;

/// Places for connections, by where they come from. As many addresses are remembered as there are connections.
#[derive(Debug, Clone)]
pub struct Places {
    each: NonZeroUsize,
    taken: Arc<Mutex<BTreeMap<IpAddr, usize>>>,
}

/// A place that is taken until this is dropped.
#[derive(Debug)]
pub struct Place {
    places: Places,
    owner: IpAddr,
}

impl Places {
    /// So many for each address.
    pub fn new(each: NonZeroUsize) -> Self {
        Self {
            each,
            taken: Arc::default(),
        }
    }

    /// A place for a connection from there, if there is one.
    pub fn enter(&self, from: IpAddr) -> Option<Place> {
        let owner = owner(from);
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let its = taken.entry(owner).or_default();
        if *its >= self.each.get() {
            return None;
        }
        *its += 1;
        Some(Place {
            places: self.clone(),
            owner,
        })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut taken = self.places.taken.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(its) = taken.get_mut(&self.owner) {
            *its -= 1;
            if *its == 0 {
                taken.remove(&self.owner);
            }
        }
    }
}

/// One name for all addresses of one owner.
fn owner(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() & IPV6_NETWORK).into(),
        v4 @ IpAddr::V4(_) => v4,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_address_has_so_many_and_what_ends_makes_room() {
        let places = Places::new(NonZeroUsize::new(2).unwrap());
        let enter = |address: &str| places.enter(address.parse().unwrap());
        let first = enter("10.0.0.1").unwrap();
        let _second = enter("10.0.0.1").unwrap();
        assert!(enter("10.0.0.1").is_none());
        assert!(
            enter("::ffff:10.0.0.1").is_none(),
            "the same address in other words"
        );
        let _other = enter("10.0.0.2").unwrap();
        drop(first);
        let _third = enter("10.0.0.1").unwrap();
        assert!(enter("10.0.0.1").is_none());

        let six = ["2001:db8::1", "2001:db8::2", "2001:db8::3", "2001:db8:0:1::1"];
        let entered: Vec<_> = six.map(enter).into_iter().collect();
        assert!(entered[..2].iter().all(Option::is_some));
        assert!(entered[2].is_none(), "of the same owner");
        assert!(entered[3].is_some());
        drop(entered);
        assert_eq!(
            places.taken.lock().unwrap().len(),
            2,
            "what is empty is forgotten"
        );
    }
}
