// Which stream used which bytes last: two uses that no event orders are a race.
//
// The device works off its queues in one order, which may be a harmless one. The clocks say what
// another order would have done: they find a copy that may start too early, or a buffer that is
// overwritten while a kernel may still read it. As torch.cuda._sanitizer, but by byte ranges.
#pragma once
#include <ATen/ATen.h>

#include <unordered_map>
#include <vector>

#include "streams.h"

namespace fakecuda {

struct Access {
  char *begin, *end;
  int stream;
  uint64_t launch;
  bool writes;
  std::string by;
};

constexpr size_t MOST_ACCESSES = 64;  // remembered for a storage

inline std::unordered_map<void*, std::vector<Access>> accesses;  // by the storage's address
inline std::map<std::string, int64_t> race_kinds;

inline std::pair<char*, char*> bytes_of(const at::Tensor& t) {
  int64_t extent = 1;
  for (int64_t d = 0; d < t.dim(); d++) extent += (t.size(d) - 1) * t.stride(d);
  char* begin = (char*)t.storage().data() + t.storage_offset() * t.element_size();
  return {begin, begin + extent * t.element_size()};
}

inline std::string describe(const Access& now, const Access& before) {
  return now.by + (now.writes ? " writes" : " reads") + " what " + before.by +
         (before.writes ? " writes" : " reads");
}

inline void report_race(const std::string& text, const Stream& stream) {
  counts.races++;
  race_kinds[text]++;
  if (settings.races == "print")
    fprintf(stderr, "[fakecuda] RACE %s (stream %d)\n", text.c_str(), stream.number);
}

// The launch that `stream` was given last reads or writes this tensor.
inline void note_access(Stream& stream, const at::Tensor& t, bool writes, const std::string& by) {
  if (settings.races == "off" || !t.defined() || !t.has_storage() || t.numel() == 0) return;
  void* base = const_cast<void*>(t.storage().data());
  if (!base) return;
  auto [begin, end] = bytes_of(t);
  Access now{begin, end, stream.number, stream.launches, writes, by};
  std::vector<Access> kept;
  std::string race;
  for (auto& before : accesses[base]) {
    bool meets = before.begin < end && begin < before.end;
    bool ordered = before.stream == stream.number || stream.clock[before.stream] >= before.launch;
    if (meets && (writes || before.writes) && !ordered) report_race(race = describe(now, before), stream);
    // Whoever is ordered after this one is ordered after what it covers.
    bool covers = meets && begin <= before.begin && before.end <= end && ordered;
    if (!(covers && writes == before.writes) && !(covers && writes)) kept.push_back(std::move(before));
  }
  kept.push_back(std::move(now));
  if (kept.size() > MOST_ACCESSES) kept.erase(kept.begin());
  accesses[base] = std::move(kept);
  TORCH_CHECK(race.empty() || settings.races != "raise", "fakecuda: race: ", race);
}

}  // namespace fakecuda
