//! This node's pods, as their network was made: what the CNI plugin says, laid over what the API server says.
//!
//! A pod is known before it has an address, and the API server hears of its address a second after it runs. The plugin
//! knows the address before it runs. From both it is judged in time.
//!
//! The plugin's word goes before the API server's, which is late: an address is the pod's that it was given to last, and
//! one that a pod has given back is no pod's, whatever their objects still say.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use landfall_cni::call::Attachment;
use landfall_core::election::PodAddresses;
use landfall_core::model::{Event, Kind, NodeName, Object, ObjectId, ObjectKey, Pod};

/// A container's interface.
pub(super) type Interface = (String, String);

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct Attached {
    me: NodeName,
    attachments: BTreeMap<Interface, Attachment>,
    /// Whose an address is, by what the plugin said last.
    owners: BTreeMap<IpAddr, Interface>,
    /// Addresses that were given back, and whose they were.
    released: BTreeMap<ObjectKey, BTreeSet<IpAddr>>,
    /// This node's pods, as the API server knows them; with addresses or without.
    objects: BTreeMap<ObjectKey, Pod>,
}

/// The name of the interface that is attached.
pub(super) fn interface(attachment: &Attachment) -> Interface {
    (attachment.container.clone(), attachment.interface.clone())
}

/// The pod that it is of, if the runtime has named it.
pub(super) fn pod(attachment: &Attachment) -> Option<ObjectKey> {
    let (namespace, name) = (attachment.namespace.as_ref()?, attachment.name.as_ref()?);
    Some(ObjectKey::new(namespace.as_str(), name.as_str()))
}

/// Whether it is of the very pod that an object is of, and not of another that had its name.
fn is_of(attachment: &Attachment, object: &Pod) -> bool {
    let same = |uid: &String| uid.is_empty() || object.uid.is_empty() || *uid == object.uid;
    pod(attachment).as_ref() == Some(&object.key) && attachment.uid.as_ref().is_none_or(same)
}

/// The first address of each family: a pod's others are no other node's business.
fn one_each(addresses: &[IpAddr]) -> BTreeSet<IpAddr> {
    let first = |v4: bool| addresses.iter().find(|address| address.is_ipv4() == v4);
    [true, false]
        .into_iter()
        .filter_map(first)
        .copied()
        .collect()
}

impl Attached {
    /// Of the pods of a node.
    pub(super) fn to(me: NodeName) -> Self {
        Self {
            me,
            attachments: BTreeMap::new(),
            owners: BTreeMap::new(),
            released: BTreeMap::new(),
            objects: BTreeMap::new(),
        }
    }

    /// What an event of the API server's means for judging pods; the event itself, if the plugin has no say in it.
    pub(super) fn adapt(&mut self, event: &Event) -> Option<Event> {
        match event {
            Event::Apply(Object::Pod(object)) => {
                if object.host_network || object.node.as_ref() != Some(&self.me) {
                    self.objects.remove(&object.key);
                    return None;
                }
                self.objects.insert(object.key.clone(), object.clone());
                Some(Event::Apply(Object::Pod(self.merged(object))))
            }
            Event::Delete(ObjectId::Pod(key)) => {
                if let Some(object) = self.objects.remove(key) {
                    self.forget(&object);
                }
                None
            }
            Event::Unwatched(Kind::Pod) => {
                self.objects.clear();
                None
            }
            Event::Apply(_) | Event::Delete(_) | Event::Synced(_) | Event::Unwatched(_) => None,
        }
    }

    /// A pod is gone: what is still attached to it will not come back, and is not to be the next one's of its name.
    fn forget(&mut self, object: &Pod) {
        self.released.remove(&object.key);
        let is_its = |attachment: &Attachment| {
            !object.uid.is_empty() && attachment.uid.as_ref() == Some(&object.uid)
        };
        let gone: Vec<Interface> = self
            .attachments
            .iter()
            .filter(|(_, attachment)| is_its(attachment))
            .map(|(interface, _)| interface.clone())
            .collect();
        for interface in gone {
            self.detach(&interface);
        }
    }

    /// A pod's interface is there: what that says of pods.
    pub(super) fn add(&mut self, attachment: Attachment) -> Vec<Event> {
        let mut touched = BTreeSet::new();
        let interface = interface(&attachment);
        if let Some(key) = pod(&attachment) {
            // The pod has another container for its network now.
            let former: Vec<Interface> = self
                .attachments
                .iter()
                .filter(|(known, other)| {
                    known.0 != interface.0 && pod(other).as_ref() == Some(&key)
                })
                .map(|(known, _)| known.clone())
                .collect();
            for former in former {
                self.detach(&former);
            }
            self.released.remove(&key);
            touched.insert(key);
        }
        touched.extend(self.detach(&interface).and_then(|former| pod(&former)));
        for address in &attachment.addresses {
            if let Some(former) = self.owners.insert(*address, interface.clone()) {
                touched.extend(self.attachments.get(&former).and_then(pod));
            }
            let others = self.objects.values();
            touched.extend(
                others
                    .filter(|object| object.addresses.contains(address))
                    .map(|object| object.key.clone()),
            );
        }
        self.attachments.insert(interface, attachment);
        self.again(&touched)
    }

    /// A pod's interface goes: what that says of pods.
    pub(super) fn del(&mut self, attachment: &Attachment) -> Vec<Event> {
        // What an earlier process was told of is not known; the API server's word stands then.
        let Some(known) = self.detach(&interface(attachment)) else {
            return Vec::new();
        };
        let Some(key) = pod(&known) else {
            return Vec::new();
        };
        let of_it = |object: &Pod| is_of(&known, object);
        if self.objects.get(&key).is_some_and(of_it) {
            let released = self.released.entry(key.clone()).or_default();
            released.extend(&known.addresses);
        }
        self.again(&[key].into())
    }

    /// Forgets an interface.
    fn detach(&mut self, interface: &Interface) -> Option<Attachment> {
        let known = self.attachments.remove(interface)?;
        for address in &known.addresses {
            if self.owners.get(address) == Some(interface) {
                self.owners.remove(address);
            }
        }
        Some(known)
    }

    /// These pods anew.
    fn again(&self, keys: &BTreeSet<ObjectKey>) -> Vec<Event> {
        let objects = keys.iter().filter_map(|key| self.objects.get(key));
        objects
            .map(|object| Event::Apply(Object::Pod(self.merged(object))))
            .collect()
    }

    /// A pod with the addresses that it has.
    fn merged(&self, object: &Pod) -> Pod {
        let released = self.released.get(&object.key);
        let holds = |address: &IpAddr| match self.owners.get(address) {
            Some(owner) => is_of(&self.attachments[owner], object),
            None => !released.is_some_and(|released| released.contains(address)),
        };
        let mut addresses: Vec<IpAddr> = object.addresses.clone();
        addresses.retain(holds);
        let own = self.attachments.iter();
        for (interface, _) in own.filter(|(_, attachment)| is_of(attachment, object)) {
            for address in &self.attachments[interface].addresses {
                if self.owners.get(address) == Some(interface) && !addresses.contains(address) {
                    addresses.push(*address);
                }
            }
        }
        Pod {
            addresses,
            ..object.clone()
        }
    }

    /// Whether the API server has told of a pod of this node.
    pub(super) fn has(&self, key: &ObjectKey) -> bool {
        self.objects.contains_key(key)
    }

    /// The addresses that a pod has, one of each family, where the API server does not say the same. Of one that has given
    /// them back it may never have known them: who was `told` of them is told so.
    pub(super) fn early(&self, key: &ObjectKey, told: bool) -> Option<PodAddresses> {
        if let Some(object) = self.objects.get(key) {
            let addresses = one_each(&self.merged(object).addresses);
            let is_over = told && addresses.is_empty();
            let uid = object.uid.as_str().into();
            return (addresses != one_each(&object.addresses) || is_over)
                .then_some(PodAddresses { uid, addresses });
        }
        let mut own = self.attachments.values();
        let own = own.find(|attachment| pod(attachment).as_ref() == Some(key))?;
        Some(PodAddresses {
            uid: own.uid.as_deref().unwrap_or_default().into(),
            addresses: one_each(&own.addresses),
        })
    }

    /// Whether the API server has told of the pod that an interface is of.
    pub(super) fn knows(&self, attachment: &Attachment) -> bool {
        let object = pod(attachment).and_then(|key| self.objects.get(&key));
        object.is_some_and(|object| is_of(attachment, object))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mk_pod(name: &str, uid: &str, addresses: &[&str]) -> Pod {
        Pod {
            key: ObjectKey::new("mail", name),
            uid: uid.into(),
            labels: BTreeMap::new(),
            addresses: addresses.iter().map(|it| it.parse().unwrap()).collect(),
            node: Some("n1".into()),
            host_network: false,
            created: 0,
            terminating: false,
        }
    }

    fn mk_attachment(container: &str, name: &str, uid: &str, address: &str) -> Attachment {
        Attachment {
            container: container.into(),
            interface: "eth0".into(),
            namespace: Some("mail".into()),
            name: Some(name.into()),
            uid: Some(uid.into()),
            addresses: vec![address.parse().unwrap()],
            host_interfaces: Vec::new(),
        }
    }

    /// Each pod that is told of anew, with its addresses.
    fn told(events: impl IntoIterator<Item = Event>) -> BTreeMap<String, Vec<String>> {
        let pod = |event| match event {
            Event::Apply(Object::Pod(pod)) => {
                let addresses = pod.addresses.iter().map(ToString::to_string).collect();
                (pod.key.name.to_string(), addresses)
            }
            other => panic!("{other:?}"),
        };
        events.into_iter().map(pod).collect()
    }

    fn apply(attached: &mut Attached, pod: Pod) -> BTreeMap<String, Vec<String>> {
        told(attached.adapt(&Event::Apply(Object::Pod(pod))))
    }

    fn is(name: &str, addresses: &[&str]) -> BTreeMap<String, Vec<String>> {
        let addresses = addresses.iter().map(|it| (*it).to_owned()).collect();
        [(name.to_owned(), addresses)].into()
    }

    #[test]
    fn either_may_be_first() {
        let mut attached = Attached::to("n1".into());
        assert_eq!(
            apply(&mut attached, mk_pod("a", "u1", &[])),
            is("a", &[]),
            "without an address"
        );
        let events = attached.add(mk_attachment("c1", "a", "u1", "10.0.0.1"));
        assert_eq!(told(events), is("a", &["10.0.0.1"]));
        let late = mk_attachment("c2", "b", "u2", "10.0.0.2");
        assert_eq!(attached.add(late.clone()), []);
        assert!(!attached.knows(&late));
        assert_eq!(
            apply(&mut attached, mk_pod("b", "u2", &[])),
            is("b", &["10.0.0.2"])
        );
        assert!(attached.knows(&late));
        // The API server has the address too by now.
        assert_eq!(
            apply(&mut attached, mk_pod("a", "u1", &["10.0.0.1"])),
            is("a", &["10.0.0.1"])
        );
    }

    #[test]
    fn another_pod_of_the_same_name_is_another() {
        let mut attached = Attached::to("n1".into());
        apply(&mut attached, mk_pod("a", "old", &["10.0.0.1"]));
        let new = mk_attachment("c2", "a", "new", "10.0.0.2");
        let events = attached.add(new.clone());
        assert_eq!(told(events), is("a", &["10.0.0.1"]));
        assert!(!attached.knows(&new), "its labels are not known");
        // The old one's end comes late, and is not the new one's.
        let gone = Event::Delete(ObjectId::Pod(ObjectKey::new("mail", "a")));
        assert_eq!(attached.adapt(&gone), None);
        assert_eq!(
            apply(&mut attached, mk_pod("a", "new", &[])),
            is("a", &["10.0.0.2"])
        );
        assert_eq!(attached.adapt(&gone), None);
        assert_eq!(
            apply(&mut attached, mk_pod("a", "newer", &[])),
            is("a", &[])
        );
        assert!(attached.attachments.is_empty() && attached.owners.is_empty());
    }

    #[test]
    fn an_address_is_whose_it_was_last() {
        let mut attached = Attached::to("n1".into());
        apply(&mut attached, mk_pod("a", "u1", &[]));
        apply(&mut attached, mk_pod("b", "u2", &[]));
        let first = mk_attachment("c1", "a", "u1", "10.0.0.1");
        attached.add(first.clone());
        apply(&mut attached, mk_pod("a", "u1", &["10.0.0.1"]));
        // Given back, though its object says otherwise; and said twice.
        assert_eq!(told(attached.del(&first)), is("a", &[]));
        assert_eq!(attached.del(&first), []);
        assert_eq!(
            apply(&mut attached, mk_pod("a", "u1", &["10.0.0.1"])),
            is("a", &[])
        );
        let events = attached.add(mk_attachment("c2", "b", "u2", "10.0.0.1"));
        let mut both = is("a", &[]);
        both.extend(is("b", &["10.0.0.1"]));
        assert_eq!(told(events), both);
        // The same when nobody said that it was given back.
        apply(&mut attached, mk_pod("c", "u3", &[]));
        let events = attached.add(mk_attachment("c3", "c", "u3", "10.0.0.1"));
        let mut all = is("a", &[]);
        all.extend(is("b", &[]));
        all.extend(is("c", &["10.0.0.1"]));
        assert_eq!(told(events), all);
        assert_eq!(
            apply(&mut attached, mk_pod("b", "u2", &["10.0.0.1"])),
            is("b", &[])
        );
    }

    #[test]
    fn a_pod_whose_network_is_made_again_has_the_new_address() {
        let mut attached = Attached::to("n1".into());
        apply(&mut attached, mk_pod("a", "u1", &[]));
        let first = mk_attachment("c1", "a", "u1", "10.0.0.1");
        attached.add(first.clone());
        let events = attached.add(mk_attachment("c2", "a", "u1", "10.0.0.2"));
        assert_eq!(told(events), is("a", &["10.0.0.2"]));
        // A late word of the first container's is of no account.
        assert_eq!(attached.del(&first), []);
        // A second interface of the same.
        let mut second = mk_attachment("c2", "a", "u1", "10.0.1.2");
        second.interface = "net1".into();
        assert_eq!(
            told(attached.add(second)),
            is("a", &["10.0.0.2", "10.0.1.2"])
        );
    }

    #[test]
    fn other_nodes_pods_are_not_its_business() {
        let mut attached = Attached::to("n1".into());
        let mut far = mk_pod("far", "u9", &["10.0.9.1"]);
        far.node = Some("n2".into());
        assert_eq!(attached.adapt(&Event::Apply(Object::Pod(far))), None);
        let mut host = mk_pod("host", "u8", &["192.0.2.1"]);
        host.host_network = true;
        assert_eq!(attached.adapt(&Event::Apply(Object::Pod(host))), None);
        assert_eq!(attached.adapt(&Event::Synced(Kind::Pod)), None);
        apply(&mut attached, mk_pod("a", "u1", &[]));
        attached.adapt(&Event::Unwatched(Kind::Pod));
        assert!(attached.objects.is_empty());
    }
}
