// Numbers as a person reads them.

export const NONE = "–";

export function bytes(number) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  const power = number > 0 ? Math.min(Math.floor(Math.log2(number) / 10), units.length - 1) : 0;
  return `${(number / 1024 ** power).toLocaleString("en", { maximumFractionDigits: 1 })} ${units[power]}`;
}

export const count = (number) => number.toLocaleString("en", { maximumFractionDigits: 0 });
export const plural = (number, word) => `${count(number)} ${word}${number === 1 ? "" : "s"}`;
export const capitalised = (text) => text[0].toUpperCase() + text.slice(1);

/** Always with the same number of digits behind the point, so that the text does not jump. */
export function rate(value) {
  if (value === undefined) return NONE;
  const digits = value >= 99.95 || value === 0 ? 0 : 1;
  return value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
}

/** A percentage; what is not nothing is not shown as nothing. */
export function share(part, whole) {
  const percent = (100 * part) / whole;
  if (percent > 0 && percent < 0.1) return "< 0.1 %";
  return `${percent.toFixed(percent > 0 && percent < 10 ? 1 : 0)} %`;
}

/** A latency: "0.84 ms", "41 ms", "1.92 s". */
export function latency(seconds) {
  if (seconds === null || seconds === undefined) return NONE;
  if (seconds < 0.01) return `${(seconds * 1000).toPrecision(2)} ms`;
  if (seconds < 0.9995) return `${(seconds * 1000).toFixed(0)} ms`;
  return `${seconds < 99.95 ? seconds.toFixed(seconds < 9.995 ? 2 : 1) : seconds.toFixed(0)} s`;
}

/** An age that is read out less often the longer it gets. */
export function age(seconds) {
  if (seconds < 60) return `${seconds < 10 ? Math.floor(seconds) : 10 * Math.floor(seconds / 10)} s`;
  if (seconds < 3600) return plural(Math.floor(seconds / 60), "minute");
  return plural(Math.floor(seconds / 3600), "hour");
}

/** "cuda:0", "cuda:1" and "cpu" as "2 × cuda, cpu". */
export function devices(names) {
  const kinds = new Map();
  for (const name of names) kinds.set(name.split(":")[0], (kinds.get(name.split(":")[0]) ?? 0) + 1);
  return [...kinds].map(([kind, number]) => (number > 1 ? `${number} × ${kind}` : kind)).join(", ");
}
