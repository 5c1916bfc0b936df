// Streams, events and the host, as CUDA orders them.
//
// A stream is a queue of work that has been launched and has not run. Nothing runs by itself: the
// queue is worked off when somebody waits for it ("late", the worst moment that CUDA allows), or at
// moments of the device's choice ("random"). An event is a place in a queue.
//   CUDA C Programming Guide, "Asynchronous Concurrent Execution": streams, events, implicit order.
#pragma once
#include <c10/core/Device.h>
#include <c10/util/Exception.h>
#include <dlfcn.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <set>
#include <string>

namespace fakecuda {

constexpr auto GPU = c10::DeviceType::CUDA;
constexpr int MOST_DEVICES = 16;

// --- settings, from the environment; read again after a fork ------------------------------------

struct Settings {
  std::string copies, kernels, races;
  size_t memory;
  bool log;
  std::mt19937 dice;
};

inline std::string variable(const char* name, const char* otherwise) {
  const char* value = getenv(name);
  return value && *value ? value : otherwise;
}

inline Settings read_settings() {
  Settings s;
  s.copies = variable("FAKECUDA_COPIES", "late");    // late | random | now
  s.kernels = variable("FAKECUDA_KERNELS", "late");  // late | now
  s.races = variable("FAKECUDA_RACES", "count");     // off | count | print | raise
  s.memory = std::stoull(variable("FAKECUDA_MEMORY", std::to_string(80ull << 30).c_str()));
  s.log = !variable("FAKECUDA_LOG", "").empty();
  s.dice.seed(std::stoul(variable("FAKECUDA_SEED", "0")));
  return s;
}

inline Settings settings = read_settings();

// A node of eight, of which ranks see as many as there are of them: each device that a process sees
// costs it a thread of autograd. Asked for anew each time, as a fork may have become a rank.
// CUDA_VISIBLE_DEVICES = "" hides all, as it does of real ones.
inline int device_count() {
  const char* visible = getenv("CUDA_VISIBLE_DEVICES");
  if (visible && !*visible) return 0;
  int n = std::stoi(variable("FAKECUDA_DEVICES", variable("LOCAL_WORLD_SIZE", "8").c_str()));
  return std::min(n, MOST_DEVICES);
}

// --- state --------------------------------------------------------------------------------------

// One lock for all of the device. Kernels run outside of it.
inline std::recursive_mutex mutex;

// Python's lock is given up while this thread waits for the device's: whoever holds that one may
// need Python's, to let go of a tensor when work has ended.
class Lock {
 public:
  explicit Lock(std::recursive_mutex& m) : mutex_(m) {
    if (mutex_.try_lock()) return;
    static const auto holds = reinterpret_cast<int (*)()>(dlsym(RTLD_DEFAULT, "PyGILState_Check"));
    static const auto give = reinterpret_cast<void* (*)()>(dlsym(RTLD_DEFAULT, "PyEval_SaveThread"));
    static const auto take = reinterpret_cast<void (*)(void*)>(dlsym(RTLD_DEFAULT, "PyEval_RestoreThread"));
    void* state = holds && give && take && holds() ? give() : nullptr;
    mutex_.lock();
    if (state) take(state);
  }
  ~Lock() { mutex_.unlock(); }
  Lock(const Lock&) = delete;
  Lock& operator=(const Lock&) = delete;

 private:
  std::recursive_mutex& mutex_;
};

// A vector clock: of each stream (by number), how many of its launches are known to be over.
using Clock = std::map<int, uint64_t>;

inline void join(Clock& into, const Clock& from) {
  for (auto& [stream, launches] : from) {
    auto& known = into[stream];
    known = std::max(known, launches);
  }
}

struct Stream;

struct Event {
  Stream* stream;
  Clock clock;
  bool done = false;
};
using EventPtr = std::shared_ptr<Event>;

struct Work {
  std::function<void()> run;
  EventPtr wait_for, record;
};

struct Stream {
  int number;
  c10::Device device;
  int64_t id;  // 0: the default stream
  std::deque<Work> queue;
  Clock clock;
  uint64_t launches = 0;
};

struct Counts {
  int64_t kernels = 0, late_copies = 0, races = 0, host_waits = 0;
};
inline Counts counts;

inline std::map<std::pair<int, int64_t>, Stream*> streams;
inline Clock host_clock;
inline int64_t next_stream_id = 1;
inline std::set<int> contexts;  // devices that this process has used

// CUDA's current device is of a thread, and a new thread has device 0
// (CUDA Runtime API, cudaSetDevice); torch's current streams are of a thread, too
// (c10/cuda/CUDAStream.cpp, current_streams).
inline thread_local int current_device = 0;
inline thread_local std::map<int, int64_t> current_stream_ids;

inline Stream& stream_of(int device, int64_t id) {
  auto& stream = streams[{device, id}];
  if (!stream)
    stream = new Stream{(int)streams.size(), c10::Device(GPU, device), id, {}, {}, 0};
  return *stream;
}

inline Stream& current_stream(int device) {
  auto found = current_stream_ids.find(device);
  return stream_of(device, found == current_stream_ids.end() ? 0 : found->second);
}

// --- working off a queue ------------------------------------------------------------------------

inline void do_next(Stream& stream);

inline void complete(Event& event) {
  while (!event.done) do_next(*event.stream);
}

inline void do_next(Stream& stream) {
  TORCH_CHECK(!stream.queue.empty(), "fakecuda: an event that is never reached");
  Work work = std::move(stream.queue.front());
  stream.queue.pop_front();
  if (work.wait_for) complete(*work.wait_for);
  if (work.run) work.run();
  if (work.record) work.record->done = true;
}

inline void drain(Stream& stream) {
  while (!stream.queue.empty()) do_next(stream);
}

// In order after all that the stream has been given; at once where that is nothing.
inline void enqueue(Stream& stream, std::function<void()> run) {
  if (stream.queue.empty())
    run();
  else
    stream.queue.push_back({std::move(run), nullptr, nullptr});
}

inline void enqueue_late(Stream& stream, std::function<void()> run) {
  stream.queue.push_back({std::move(run), nullptr, nullptr});
}

// With "random", the device works at each call with some luck.
inline void maybe_work() {
  if (settings.copies != "random") return;
  for (auto& [key, stream] : streams)
    while (!stream->queue.empty() && settings.dice() % 3 == 0) do_next(*stream);
}

inline EventPtr record_on(Stream& stream) {
  auto event = std::make_shared<Event>();
  event->stream = &stream;
  stream.clock[stream.number] = stream.launches;
  event->clock = stream.clock;
  if (stream.queue.empty())
    event->done = true;
  else
    stream.queue.push_back({nullptr, nullptr, event});
  return event;
}

inline void log_launch(const Stream& stream, const std::string& what) {
  if (settings.log)
    fprintf(stderr, "[fakecuda] cuda:%d stream %ld #%lu %s\n", (int)stream.device.index(),
            (long)stream.id, (unsigned long)stream.launches, what.c_str());
}

// The host has told the stream of one more kernel or copy.
inline void note_launch(Stream& stream, const std::string& what) {
  stream.launches++;
  join(stream.clock, host_clock);
  stream.clock[stream.number] = stream.launches;
  contexts.insert(stream.device.index());
  log_launch(stream, what);
}

inline void host_waits_for(Stream& stream) {
  drain(stream);
  stream.clock[stream.number] = stream.launches;
  join(host_clock, stream.clock);
}

// --- telling that the host has waited -----------------------------------------------------------

// Called without the lock: it takes Python's.
inline void (*on_host_wait)(const char* why) = nullptr;

inline void tell_host_wait(const char* why) {
  {
    Lock lock(mutex);
    counts.host_waits++;
  }
  if (on_host_wait) on_host_wait(why);
}

}  // namespace fakecuda
