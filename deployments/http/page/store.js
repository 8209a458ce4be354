// Finished requests with their pictures, kept in this browser. IndexedDB, for it holds files; where it is shut off, as in
// some private windows, nothing is kept and nothing else changes.

const KEEP = 60;
const STORE = "requests";

let opened = null;

function open() {
  opened ??= new Promise((resolve, reject) => {
    const request = indexedDB.open("tetriserve", 1);
    request.onupgradeneeded = () => request.result.createObjectStore(STORE, { keyPath: "id", autoIncrement: true });
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
  return opened;
}

/** What `work` asks of the store, null where there is none. */
async function on(mode, work) {
  try {
    const transaction = (await open()).transaction(STORE, mode);
    const request = work(transaction.objectStore(STORE));
    return await new Promise((resolve, reject) => {
      transaction.oncomplete = () => resolve(request.result);
      transaction.onerror = transaction.onabort = () => reject(transaction.error);
    });
  } catch {
    return null;
  }
}

/** Keeps one; the oldest beyond `KEEP` go. Resolves to its id. */
export async function keep(entry) {
  const id = await on("readwrite", (store) => store.add(entry));
  const ids = (await on("readonly", (store) => store.getAllKeys())) ?? [];
  const old = ids.slice(0, Math.max(0, ids.length - KEEP));
  if (old.length) await on("readwrite", (store) => store.delete(IDBKeyRange.upperBound(old.at(-1))));
  return id;
}

/** Those that are kept, oldest first. */
export const kept = async () => (await on("readonly", (store) => store.getAll())) ?? [];

export const forget = (id) => on("readwrite", (store) => store.delete(id));

export const forgetAll = () => on("readwrite", (store) => store.clear());
